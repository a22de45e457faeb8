"""The training loop. A run is a list of phases that share one work directory.

Everything a phase needs is checked before the first step. After an interrupt, a kill or a NaN, the same command resumes
from the newest complete checkpoint, bitwise.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from micro_dit.data.pipeline import make_train_iterator
from micro_dit.data.shards import Manifest
from micro_dit.diffusion.generate import Sampling
from micro_dit.errors import UserError
from micro_dit.evaluation.during_training import EvaluationSettings, ImageMetrics, TrainingEvaluation
from micro_dit.evaluation.evaluator import Results, Weights
from micro_dit.images import save_png
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import Params, abstract_params
from micro_dit.models.flops import training_flops
from micro_dit.parallel import mesh as meshes
from micro_dit.parallel import sharding
from micro_dit.parallel.cpu import compiler_options, register_lowerings
from micro_dit.parallel.distributed import main_first
from micro_dit.planning.chips import Chip, chip_of, measure_chip
from micro_dit.planning.cost import estimate_cost
from micro_dit.training.checkpoint import Checkpoints, Meta
from micro_dit.training.curves import finish
from micro_dit.training.metrics import MetricWriter
from micro_dit.training.phases import Phase, make_phases, phase_starts, with_mask_ratio
from micro_dit.training.pretrained import Start, has_checkpoints, load_start, load_under, place
from micro_dit.training.progress import Progress
from micro_dit.training.recipe import Recipe, make_recipe
from micro_dit.training.report import compile_step, parameter_table
from micro_dit.training.save_schedule import Interrupt, SaveSchedule
from micro_dit.training.shards import TrainingData, prepare_shards
from micro_dit.training.state import TrainState, enter_phase, init_state, state_from
from micro_dit.training.step import Metrics, abstract_train_state, make_train_step, network_of
from micro_dit.training.workdir import claim_workdir


def train(config: Any, workdir: str | Path) -> Path:
    """Trains a config (see configs/mask75.py), or resumes its run in the work directory.

    Returns:
        The work directory.

    Raises:
        UserError: The config, the shards or the work directory needs a correction, or the loss is not finite.
    """
    # 1. Check everything that can be checked before the first step.
    run, start = check(config, Path(workdir).absolute())

    # 2. Report the plan.
    report_plan(run)

    # 3. Restore, or start.
    total = run.starts[-1]
    keep_steps = tuple(run.starts[1:])
    checkpoints = Checkpoints(run.workdir, keep_steps=keep_steps, keep_every=run.config.keep_every, clean=True)
    state, meta, base = restore_or_start(run, start, checkpoints)
    del start  # the copy on the host

    # 4. Train phase after phase.
    writer = MetricWriter(
        run.workdir, tensorboard=run.config.logging.tensorboard, wandb_project=run.config.logging.wandb_project or None,
        config=run.config.to_dict(), enabled=jax.process_index() == 0,
    )  # fmt: skip
    evaluation = main_first(lambda: load_evaluation(run))
    with Interrupt() as interrupt:
        saves = SaveSchedule(
            interrupt, every=run.config.checkpoint_every, keep_every=run.config.keep_every,
            minutes=run.config.checkpoint_minutes,
        )  # fmt: skip
        for index, phase in enumerate(run.phases):
            if meta.step >= run.starts[index + 1]:
                continue  # finished before the restart
            if index > meta.phase:
                meta = dataclasses.replace(meta, phase=index, data=None)
                places = sharding.shardings_of(run.abstract_state(index))
                optimizer = run.recipe.optimizer(phase)
                state = enter_phase(state, optimizer, phase.ema_decay > 0, phase.fresh_optimizer, places)
            state, meta = PhaseLoop(run, index, checkpoints, writer, saves, evaluation, base).train(state, meta)
            if saves.stop_requested() and meta.step < total:
                break
    checkpoints.close()
    writer.close()

    # 5. Finish.
    if meta.step < total:
        done = f"step {meta.step:,} of {total:,}"
        run.say(f"stopped at {done}, saved in {run.workdir}: resumable by running the same command again.")
    elif jax.process_index() == 0:
        spans = [(phase.name, run.starts[i], run.starts[i + 1]) for i, phase in enumerate(run.phases)]
        run.say(finish(run.workdir, spans, meta, next(iter(run.config.sampling.prompts), None)))
    return run.workdir


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose settings are checked.

    Attributes:
        config: The config, with masking.ratio applied to its phases.
        workdir: The work directory.
        mesh: The devices.
        recipe: Settings that all phases share.
        phases: The phases.
        starts: First step of each phase, and the total number of steps.
        networks: Network of each phase.
        manifests: Manifest of each phase's shards.
        chip: The kind of device.
        say: Prints a line, on the first process only.
    """

    config: Any
    workdir: Path
    mesh: jax.sharding.Mesh
    recipe: Recipe
    phases: tuple[Phase, ...]
    starts: list[int]
    networks: list[DiTConfig]
    manifests: list[Manifest]
    chip: Chip
    say: Callable[[str], None]

    def abstract_state(self, phase: int) -> TrainState:
        """Returns shapes, dtypes and shardings of the state in a phase."""
        return abstract_train_state(self.networks[phase], self.phases[phase], self.recipe, self.mesh)


def check(config: Any, workdir: Path) -> tuple[Run, Start | None]:
    """Checks everything that can be checked before the first step, and claims the work directory.

    Returns:
        The run, and the weights that it starts from, if the config names any and nothing is saved yet.

    Raises:
        UserError: Something is wrong. Nothing is written then.
    """
    main_process = jax.process_index() == 0
    say: Callable[[str], None] = (lambda text: print(text, flush=True)) if main_process else (lambda text: None)
    config = copy.deepcopy(config)
    config.phases = with_mask_ratio(config.phases, config.masking.ratio)
    phases, recipe, mesh = make_phases(config.phases), make_recipe(config), meshes.make_mesh(config.mesh)
    for phase in phases:
        recipe.check_batch(phase, mesh)
    manifests = main_first(lambda: prepare_shards(TrainingData(**config.data), phases, recipe.sigma_data, say))
    vae, text = manifests[0].vae, manifests[0].text_encoder
    networks = [network_of(phase, config.model, vae, text) for phase in phases]
    sharding.param_shardings(mesh, abstract_params(networks[0]))
    recipe.trainable(networks[0]).abstract()
    start = load_start(config.init_from) if config.init_from and not has_checkpoints(workdir) else None
    if start:
        start.check(networks[0], manifests[0], recipe.sigma_data, config.data.vae, config.data.text_encoder)
    shards = {
        "vae": vae.fingerprint, "text_encoder": text.fingerprint, "caption_tokens": text.tokens,
        "caption_cleaning": manifests[0].caption_cleaning, "attribution": manifests[0].attribution,
        "files": [manifest.fingerprint for manifest in manifests],
    }  # fmt: skip
    main_first(lambda: claim_workdir(workdir, config.to_dict(), shards) if main_process else None)
    chip = chip_of(jax.devices()[0].device_kind) or measure_chip()
    return Run(config, workdir, mesh, recipe, phases, phase_starts(phases), networks, manifests, chip, say), start


def report_plan(run: Run) -> None:
    """Prints the parameters, how they are sharded, and predicted time and cost."""
    params, cost = abstract_params(run.networks[0]), run.config.cost
    run.say(parameter_table(params))
    if run.mesh.size > 1:
        run.say(sharding.sharding_table(run.mesh, params))
    predicted = estimate_cost(
        run.networks, run.phases, run.chip, run.mesh.size, mfu=cost.mfu, price=cost.dollars_per_device_hour,
        caption_tokens=run.manifests[0].text_encoder.tokens,
    )  # fmt: skip
    run.say(predicted.table())


def restore_or_start(
    run: Run, start: Start | None, checkpoints: Checkpoints
) -> tuple[TrainState, Meta, dict[str, jax.Array] | None]:
    """Restores the newest readable checkpoint, or makes the state of step 0.

    Args:
        run: The run.
        start: Weights to start from, for a run without checkpoints.
        checkpoints: The run's checkpoints.

    Returns:
        The state, its meta, and the parameters under a LoRA adapter (None without LoRA), all on the devices.
    """
    restored = checkpoints.restore(lambda meta: run.abstract_state(meta["phase"]), warn=run.say)
    if restored is not None:
        state, meta = restored[0], Meta.from_dict(restored[1])
        run.say(f"continuing from step {meta.step} of {run.starts[-1]} ({checkpoints.folder / str(meta.step)})")
        start = load_under(meta.lora) if meta.lora else None
    else:
        places, phase = sharding.shardings_of(run.abstract_state(0)), run.phases[0]
        optimizer, with_ema = run.recipe.optimizer(phase), phase.ema_decay > 0
        if start and not run.recipe.lora:
            state, meta = state_from(place(start.params, places.params), optimizer, places, with_ema), Meta()
        else:
            trainable = run.recipe.trainable(run.networks[0])
            state = init_state(trainable, optimizer, run.config.seed, places, with_ema)
            meta = Meta(lora=start.under(run.recipe.lora) if start and run.recipe.lora else None)
        if start:
            run.say(f"starting from {start}")
    if start is None or not meta.lora:
        return state, meta, None
    return state, meta, place(start.params, sharding.param_shardings(run.mesh, start.params))


def load_evaluation(run: Run) -> TrainingEvaluation:
    """Loads what the evaluators of all phases share."""
    data, sampling, metrics = run.config.data, run.config.sampling, run.config.evaluation.to_dict()
    settings = EvaluationSettings(
        loss_every=run.config.evaluate_every, split=data.heldout, loss_images=data.heldout_images,
        previews_every=sampling.every, prompts=sampling.prompts, sampling=Sampling(sampling.steps, sampling.guidance),
        metrics_every=metrics.pop("every"), metrics=ImageMetrics(**metrics), vae=data.vae,
        text_encoder=data.text_encoder, sigma_data=run.recipe.sigma_data, dtype=run.recipe.dtype,
    )  # fmt: skip
    return TrainingEvaluation(settings, run.manifests[0], run.workdir, meshes.replicated(run.mesh), run.say)


@dataclasses.dataclass(frozen=True)
class PhaseLoop:
    """The loop over the steps of one phase.

    Attributes:
        run: The run.
        index: Number of the phase.
        checkpoints: Where states are saved.
        writer: Where metrics are written.
        saves: When to save and when to stop.
        evaluation: Makes the phase's evaluators.
        base: The parameters under a LoRA adapter.
    """

    run: Run
    index: int
    checkpoints: Checkpoints
    writer: MetricWriter
    saves: SaveSchedule
    evaluation: TrainingEvaluation
    base: dict[str, jax.Array] | None

    def train(self, state: TrainState, meta: Meta) -> tuple[TrainState, Meta]:
        """Trains the phase from `state` on; returns early after a signal, with everything saved."""
        run, phase, last_step = self.run, self.run.phases[self.index], self.run.starts[self.index + 1]
        iterator = self._data(meta)
        shards = phase.shards or run.config.data.shards
        evaluators = self.evaluation.evaluators(
            run.networks[self.index], phase, shards, last_step, self.saves.stop_requested
        )
        progress, start, started = self._progress(meta), meta, time.monotonic()

        def meta_at(step: int) -> Meta:
            """Returns the counters after a step; the data position is that of the batches taken until now."""
            return dataclasses.replace(
                start, step=step, images=start.images + (step - start.step) * phase.batch_size,
                seconds=start.seconds + time.monotonic() - started, dollars=progress.dollars,
                data=iterator.get_state(), model=dataclasses.asdict(run.networks[self.index]),
            )  # fmt: skip

        key = jax.jit(jax.random.key, out_shardings=meshes.replicated(run.mesh))(np.uint32(run.config.seed))
        batch = meshes.to_device(next(iterator), run.mesh)
        compiled = self._compile(state, batch, key)
        step, previous = meta.step, None
        while True:
            # The order matters: dispatch the step, and only then read the metrics of the one before, so that the device
            # never waits; the iterator's position is saved before the next batch is taken, so that it fits the state.
            state, metrics = compiled(state, batch, key, self.base)
            step += 1
            if previous is not None:
                self._record(step - 1, previous, progress)
            previous = metrics
            saving, stopping = self.saves.after(step)
            ending = stopping or step == last_step
            due = [evaluator for evaluator in evaluators if evaluator.due(step)]
            if saving or ending or due:
                # Nothing is saved or shown before this step's loss is known to be finite.
                self._record(step, previous, progress)
                previous = None
                with progress.paused():
                    if saving or ending:
                        self.checkpoints.save(state, meta_at(step).to_dict(), wait=ending)
                        self.saves.saved()
                    weights = Weights(state.params, state.ema, self._merge)
                    for evaluator in due:
                        if not self.saves.stop_requested():
                            self._write(step, evaluator.run(weights, step))
                    if due and not ending and self.saves.stop_requested():  # a signal came during an evaluation
                        ending = True
                        self.checkpoints.save(state, meta_at(step).to_dict(), wait=True)
            if ending:
                progress.close()
                return state, meta_at(step)
            batch = meshes.to_device(next(iterator), run.mesh)

    def _data(self, meta: Meta) -> Any:
        """Returns the iterator over batches, at the position where the run continues."""
        config, phase = self.run.config, self.run.phases[self.index]
        share, shares = meshes.share_of_batch(self.run.mesh)
        iterator = make_train_iterator(
            phase.shards or config.data.shards, "train", phase.resolution, phase.batch_size,
            seed=config.seed + self.index, process_index=share, process_count=shares,
        )  # fmt: skip
        if meta.data is not None:
            iterator.set_state(meta.data)
        return iterator

    def _progress(self, meta: Meta) -> Progress:
        """Returns the progress display of the phase."""
        run, phase, chip = self.run, self.run.phases[self.index], self.run.chip
        tokens = run.manifests[0].text_encoder.tokens
        return Progress(
            phase.name, phase.steps, meta.step - run.starts[self.index], phase.batch_size,
            flops_per_image=training_flops(run.networks[self.index], phase.mask_ratio, tokens, phase.mask_position),
            peak_flops=chip.peak_flops * run.mesh.size if chip.name != "cpu" else chip.peak_flops,
            dollars_per_hour=run.config.cost.dollars_per_device_hour * run.mesh.size, dollars_before=meta.dollars,
            enabled=jax.process_index() == 0,
        )  # fmt: skip

    def _compile(self, state: TrainState, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
        """Compiles the train step, which takes the place of its state in memory."""
        run, phase = self.run, self.run.phases[self.index]
        register_lowerings()
        step = jax.jit(
            make_train_step(run.networks[self.index], phase, run.starts[self.index], run.recipe, run.mesh),
            donate_argnums=0,
            out_shardings=(sharding.shardings_of(state), meshes.replicated(run.mesh)),
            compiler_options=compiler_options(),
        )
        return compile_step(phase.name, step, (state, batch, key, self.base), run.say)

    def _merge(self, params: Params) -> Params:
        """Returns the network's parameters."""
        return self.run.recipe.trainable(self.run.networks[self.index]).merge(params, self.base)

    def _record(self, step: int, metrics: Metrics, progress: Progress) -> None:
        """Shows and writes a step's metrics.

        Raises:
            UserError: The loss or the gradient is not finite. Nothing of this step is saved then.
        """
        run, values = self.run, {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
            progress.close()
            self.checkpoints.close()
            folder, steps = self.checkpoints.folder, self.checkpoints.steps
            kept = f"the last good checkpoint is {folder / str(steps[0])}" if steps else "no checkpoint was saved yet"
            raise UserError(
                f"the loss is {values['loss']} (gradient norm {values['gradient_norm']}) at step {step}, in phase "
                f"{run.phases[self.index].name!r}; {kept}; lower learning_rate or clip and restart in a new --workdir."
            )
        progress.update(step - run.starts[self.index], values)
        if (every := run.config.logging.every) and (step % every == 0 or step == run.starts[self.index + 1]):
            self.writer.write_scalars(step, values | progress.scalars())

    def _write(self, step: int, results: Results) -> None:
        """Writes scalars, and images with their files."""
        if results.scalars:
            self.writer.write_scalars(step, results.scalars)
        for name, picture in results.images.items():
            self.writer.write_images(step, {name: picture.pixels})
            if jax.process_index() == 0:
                save_png(picture.pixels, self.run.workdir / name / f"step_{step:08d}.png", picture.metadata)
