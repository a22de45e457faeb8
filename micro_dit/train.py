"""The training of a model, top to bottom: one step, and the loop around it.

A run is a list of phases that hand over to each other in one work directory. Everything a phase needs is checked before
the first step; whatever happens afterwards (an interrupt, a kill, a NaN), the same command goes on from the last whole
checkpoint, exactly.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from micro_dit.data.mixture import read_mix
from micro_dit.data.pipeline import load_split, make_train_iterator
from micro_dit.data.shards import Manifest
from micro_dit.diffusion.generate import Sampling
from micro_dit.errors import UserError
from micro_dit.evaluation.during_training import make_training_evaluation
from micro_dit.evaluation.previews import Previews
from micro_dit.evaluation.validation_loss import make_heldout_loss
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import abstract_params
from micro_dit.models.flops import training_flops
from micro_dit.parallel import mesh as meshes
from micro_dit.parallel import sharding
from micro_dit.parallel.cpu import compiler_options, register_lowerings
from micro_dit.parallel.distributed import main_first
from micro_dit.planning.chips import Chip, chip_of, measure_chip
from micro_dit.training import report
from micro_dit.training.checkpoint import Checkpoints
from micro_dit.training.metrics import MetricWriter
from micro_dit.training.phases import Phase, make_phases, phase_starts
from micro_dit.training.pretrained import has_checkpoints, load_start, load_under, place
from micro_dit.training.progress import Progress
from micro_dit.training.recipe import Recipe, make_recipe, with_mask_ratio
from micro_dit.training.save_schedule import Interrupt, Saving
from micro_dit.training.shards import prepare_shards
from micro_dit.training.state import TrainState, enter_phase, init_state, state_from
from micro_dit.training.step import Metrics, abstract_train_state, make_train_step, network_of
from micro_dit.training.workdir import claim_workdir


def train(config: Any, workdir: str | Path) -> Path:
    """Trains by a config (see configs/mask75.py); goes on where the last run in the work directory stopped.

    Returns:
        The work directory.

    Raises:
        UserError: the config, the shards or the work directory needs the user's hand, or the loss is not finite.
    """
    workdir = Path(workdir).absolute()
    main_process = jax.process_index() == 0
    say: Callable[[str], None] = (lambda text: print(text, flush=True)) if main_process else (lambda text: None)

    # 1. Check everything that can be checked before the first step.
    config = with_mask_ratio(config)
    phases = make_phases(config.phases)
    starts = phase_starts(phases)
    mesh = meshes.make_mesh(config.mesh)
    recipe = make_recipe(config)
    for phase in phases:
        recipe.check_batch(phase, mesh)
    manifests = main_first(lambda: prepare_shards(config, phases, say))
    manifest = manifests[0]
    networks = [network_of(phase, config.model, manifest.vae, manifest.text_encoder) for phase in phases]
    text = manifest.text_encoder
    about_shards = {
        "vae": manifest.vae.fingerprint, "text_encoder": text.fingerprint, "caption_tokens": text.tokens,
        "caption_cleaning": manifest.caption_cleaning, "attribution": manifest.attribution,
        "files": [m.fingerprint for m in manifests],
    }  # fmt: skip
    overview = sharding.sharding_table(mesh, abstract_params(networks[0]))
    start = load_start(config.init_from) if config.init_from and not has_checkpoints(workdir) else None
    if start:
        start.check(networks[0], manifest, recipe.sigma_data, config.data.vae, config.data.text_encoder)
        if recipe.lora:
            recipe.lora.abstract(start.params)  # says now if nothing can be adapted
    main_first(lambda: claim_workdir(workdir, config.to_dict(), about_shards) if main_process else None)

    # 2. Say what is going to happen.
    chip = chip_of(jax.devices()[0].device_kind) or measure_chip()
    say(report.parameter_table(abstract_params(networks[0])))
    if mesh.size > 1:
        say(overview)
    device_price = config.cost.dollars_per_device_hour
    say(report.plan_table(networks, phases, chip, mesh.size, config.cost.mfu, device_price, text.tokens))

    # 3. Restore, or start.
    checkpoints = Checkpoints(workdir, keep_steps=tuple(starts[1:]), keep_every=config.keep_every, clean=True)

    def abstract_of(meta: Mapping[str, Any]) -> TrainState:
        return abstract_train_state(networks[meta["phase"]], phases[meta["phase"]], recipe, mesh)

    restored = checkpoints.restore(abstract_of, warn=say)
    meta: dict[str, Any]
    if restored is None:
        places = sharding.shardings_of(abstract_of({"phase": 0}))
        optimizer, with_ema = recipe.optimizer(phases[0]), phases[0].ema_decay > 0
        meta = {"step": 0, "phase": 0, "images": 0, "seconds": 0.0, "dollars": 0.0, "data": None}
        if start and not recipe.lora:
            state = state_from(place(start.params, places.params), optimizer, places, with_ema)
        else:
            state = init_state(networks[0], optimizer, config.seed, places, with_ema, recipe.lora)
        if start:
            say(f"starting from {start}")
            meta |= {"lora": start.under(recipe.lora)} if recipe.lora else {}
    else:
        state, meta = restored
        say(f"continuing from step {meta['step']} of {starts[-1]} ({checkpoints.folder / str(meta['step'])})")
        start = load_under(meta["lora"]) if recipe.lora else None
    base = None
    if start and recipe.lora:
        base = place(start.params, sharding.param_shardings(mesh, start.params))
    start = None  # the host's copy

    # 4. Train phase after phase.
    writer = MetricWriter(
        workdir, tensorboard=config.logging.tensorboard, wandb_project=config.logging.wandb_project or None,
        config=config.to_dict(), enabled=main_process,
    )  # fmt: skip
    sampling = config.sampling
    previews = main_first(lambda: Previews(
        workdir, sampling.prompts, manifest, vae=config.data.vae, text_encoder=config.data.text_encoder,
        sampling=Sampling(sampling.steps, sampling.guidance), sigma_data=recipe.sigma_data, dtype=recipe.dtype,
        sharding=meshes.replicated(mesh),
    ))  # fmt: skip
    price = device_price * mesh.size
    run = _Run(config, workdir, mesh, recipe, manifests, chip, price, checkpoints, writer, previews, say, base)
    with Interrupt() as interrupt:
        saving = Saving(
            interrupt, every=config.checkpoint_every, keep_every=config.keep_every, minutes=config.checkpoint_minutes
        )
        for index, (phase, network) in enumerate(zip(phases, networks, strict=True)):
            if meta["step"] >= starts[index + 1]:
                continue  # done before the restart
            if index > meta["phase"]:
                places = sharding.shardings_of(abstract_of({"phase": index}))
                state = enter_phase(state, recipe.optimizer(phase), phase.ema_decay > 0, phase.fresh_optimizer, places)
                meta |= {"phase": index, "data": None}
            state, meta = run.phase(phase, network, starts[index], state, meta, saving)
            if saving.told_to_stop() and meta["step"] < starts[-1]:
                checkpoints.close()
                writer.close()
                done = f"step {meta['step']:,} of {starts[-1]:,}"
                say(f"stopped at {done}, saved in {workdir}: resumable by running the same command again.")
                return workdir

    # 5. Leave something to look at.
    checkpoints.close()
    writer.close()
    if main_process:
        spans = [(phase.name, first, last) for phase, first, last in zip(phases, starts, starts[1:], strict=False)]
        example = previews.prompts[0] if previews.prompts else None
        say(report.finish(workdir, spans, meta, example))
    return workdir


@dataclasses.dataclass
class _Run:
    """What the phases of a run share."""

    config: Any
    workdir: Path
    mesh: jax.sharding.Mesh
    recipe: Recipe
    manifests: list[Manifest]
    chip: Chip
    price: float
    checkpoints: Checkpoints
    writer: MetricWriter
    previews: Previews
    say: Callable[[str], None]
    base: dict[str, jax.Array] | None  # the parameters under a LoRA adapter

    def whole(self, params: Any) -> Any:
        """The network's parameters, of what is trained."""
        return self.recipe.lora.merge(self.base, params) if self.recipe.lora and self.base else params

    def phase(
        self, phase: Phase, network: DiTConfig, first_step: int, state: TrainState, meta: dict[str, Any],
        saving: Saving,
    ) -> tuple[TrainState, dict[str, Any]]:  # fmt: skip
        """Trains one phase, from wherever `state` is in it; returns early on an interrupt, with everything saved."""
        config, last_step = self.config, first_step + phase.steps
        share, shares = meshes.share_of_batch(self.mesh)
        iterator = make_train_iterator(
            phase.shards or config.data.shards, "train", phase.resolution, phase.batch_size,
            seed=config.seed + meta["phase"], process_index=share, process_count=shares,
        )  # fmt: skip
        if meta["data"] is not None:
            iterator.set_state(meta["data"])
        heldout, measure = self._heldout_loss(phase, network), self._evaluation(phase, network)
        progress = Progress(
            phase.name, phase.steps, meta["step"] - first_step, phase.batch_size,
            flops_per_image=training_flops(
                network, phase.mask_ratio, self.manifests[0].text_encoder.tokens, phase.mask_position
            ),
            peak_flops=self.chip.peak_flops * self.mesh.size if self.chip.name != "cpu" else self.chip.peak_flops,
            dollars_per_hour=self.price, dollars_before=meta["dollars"], enabled=jax.process_index() == 0,
        )  # fmt: skip
        before, started = dict(meta), time.monotonic()

        def meta_at(step: int) -> dict[str, Any]:
            """Counters at a step; the data's position is that of the batches taken until now."""
            return before | {
                "step": step,
                "images": before["images"] + (step - before["step"]) * phase.batch_size,
                "seconds": before["seconds"] + time.monotonic() - started,
                "dollars": progress.dollars,
                "data": iterator.get_state(),
                "model": dataclasses.asdict(network),
            }

        key = jax.jit(jax.random.key, out_shardings=meshes.replicated(self.mesh))(np.uint32(config.seed))
        batch = meshes.to_device(next(iterator), self.mesh)
        register_lowerings()
        step_function = jax.jit(
            make_train_step(network, phase, first_step, self.recipe, self.mesh),
            donate_argnums=0,
            out_shardings=(sharding.shardings_of(state), meshes.replicated(self.mesh)),
            compiler_options=compiler_options(),
        )
        compiled = report.compile_step(phase.name, step_function, (state, batch, key, self.base), self.say)

        step, previous = meta["step"], None
        while True:
            # The order matters: dispatch the step, and only then read the metrics of the one before, so that the device
            # never waits; the iterator's position is saved before the next batch is taken, so that it fits the state.
            state, metrics = compiled(state, batch, key, self.base)
            step += 1
            if previous is not None:
                self._record(step - 1, first_step, previous, progress, phase)
            previous = metrics
            saves, stops = saving.after(step)
            ends = stops or step == last_step
            saves = saves or ends
            evaluates = step == last_step or (config.evaluate_every and step % config.evaluate_every == 0)
            samples = step == last_step or (config.sampling.every and step % config.sampling.every == 0)
            measures = measure is not None and (step == last_step or step % config.evaluation.every == 0)
            if saves or evaluates or samples or measures:
                # Nothing is saved or shown before this step's loss is known to be finite.
                self._record(step, first_step, previous, progress, phase)
                previous = None
                with progress.paused():
                    if saves:
                        self.checkpoints.save(state, meta_at(step), wait=ends)
                        saving.saved()
                    if evaluates and heldout is not None:
                        self._evaluate(step, state, heldout, saving)
                    if samples and not saving.told_to_stop():
                        grid = self.previews.draw(network, self.whole(state.best_params), step)
                        if grid is not None:
                            self.writer.write_images(step, {"samples": grid})
                    if measure and measures and not saving.told_to_stop():
                        self.writer.write_scalars(step, measure(self.whole(state.best_params)))
                    if (evaluates or samples or measures) and not ends and saving.told_to_stop():  # meanwhile
                        ends = True
                        self.checkpoints.save(state, meta_at(step), wait=True)
            if ends:
                break
            batch = meshes.to_device(next(iterator), self.mesh)
        progress.close()
        return state, meta_at(step)

    def _evaluate(self, step: int, state: TrainState, heldout: Callable[..., dict[str, float]], saving: Saving) -> None:
        """Writes the held-out losses, unless told to stop before they are there."""
        scalars = heldout(self.whole(state.params), saving.told_to_stop)
        if scalars and state.ema is not None:
            raw, averaged = scalars["heldout_loss"], heldout(self.whole(state.ema), saving.told_to_stop)
            scalars = averaged and averaged | {"heldout_loss": raw, "heldout_loss_ema": averaged["heldout_loss"]}
        if scalars:
            self.writer.write_scalars(step, scalars)

    def _record(self, step: int, first_step: int, metrics: Metrics, progress: Progress, phase: Phase) -> None:
        """Shows and writes a step's metrics; a loss that is not finite ends the run before anything is saved."""
        values = {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
            progress.close()
            self.checkpoints.close()
            folder, steps = self.checkpoints.folder, self.checkpoints.steps
            kept = f"the last good checkpoint is {folder / str(steps[0])}" if steps else "no checkpoint was saved yet"
            raise UserError(
                f"the loss is {values['loss']} (gradient norm {values['gradient_norm']}) at step {step}, in phase "
                f"{phase.name!r}; {kept}; lower learning_rate or clip and start anew in another --workdir."
            )
        progress.update(step - first_step, values)
        if (every := self.config.logging.every) and (step % every == 0 or step == first_step + phase.steps):
            self.writer.write_scalars(step, values | progress.scalars())

    def _heldout_loss(self, phase: Phase, network: DiTConfig) -> Callable[..., dict[str, float]] | None:
        split = self.config.data.heldout
        shards = phase.shards or self.config.data.shards
        if not split or not read_mix(shards).manifest().records(split):
            return None
        data = load_split(shards, split, phase.resolution, self.config.data.heldout_images)
        return make_heldout_loss(
            network, data, P_mean=phase.P_mean, P_std=phase.P_std, sigma_data=self.recipe.sigma_data,
            dtype=jnp.dtype(self.recipe.dtype), sharding=meshes.replicated(self.mesh),
        )  # fmt: skip

    def _evaluation(self, phase: Phase, network: DiTConfig) -> Callable[[Any], dict[str, float]] | None:
        data, sampling, recipe = self.config.data, self.config.sampling, self.recipe
        return make_training_evaluation(
            network, shards=phase.shards or data.shards, split=data.heldout or "train", resolution=phase.resolution,
            vae=data.vae, sampling=Sampling(sampling.steps, sampling.guidance), sigma_data=recipe.sigma_data,
            dtype=recipe.dtype, sharding=meshes.replicated(self.mesh), warn=self.say, **self.config.evaluation,
        )  # fmt: skip
