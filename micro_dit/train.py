"""The training of a model, top to bottom: one step, and the loop around it.

A run is a list of phases that hand over to each other in one work directory. Everything a phase needs is checked before
the first step; whatever happens afterwards (an interrupt, a kill, a NaN), the same command goes on from the last whole
checkpoint, exactly.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from micro_dit import budget
from micro_dit.data.mix import check_alike, read_mix
from micro_dit.data.pipeline import load_split, make_train_iterator
from micro_dit.data.shards import MANIFEST, Manifest, shards_folder
from micro_dit.diffusion import edm
from micro_dit.errors import UserError
from micro_dit.evaluation.heldout import make_heldout_loss
from micro_dit.models.dit import REMAT, DiTConfig, abstract_params, bind, make_config
from micro_dit.models.masking import random_mask
from micro_dit.models.moe import anywhere
from micro_dit.parallel import mesh as meshes
from micro_dit.parallel import sharding
from micro_dit.parallel.compilation import compiler_options
from micro_dit.parallel.distributed import any_process, main_first
from micro_dit.training import report
from micro_dit.training.checkpoint import Checkpoints
from micro_dit.training.ema import update_ema
from micro_dit.training.interrupt import Interrupt
from micro_dit.training.metrics import MetricWriter
from micro_dit.training.optimizer import make_optimizer
from micro_dit.training.phases import Phase, make_phases, phase_starts
from micro_dit.training.previews import Previews
from micro_dit.training.progress import Progress
from micro_dit.training.state import TrainState, abstract_state, enter_phase, init_state, stream
from micro_dit.training.workdir import claim_workdir

Metrics = dict[str, jax.Array]
ASK_EVERY = 10  # steps after which processes tell each other whether to stop


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all phases of a run have in common.

    Attributes:
        sigma_data: standard deviation of the latents.
        caption_drop: probability that a caption's embedding is zeroed in training.
        dtype: of the matrix products.
        remat: what the backward pass computes again, see `micro_dit.models.dit.rematerialized`.
        adam: b1, b2, eps and weight_decay of `make_optimizer`.
        microbatch: images per forward and backward pass over all devices; 0 takes the whole batch at once.
    """

    sigma_data: float
    caption_drop: float
    dtype: str
    remat: str
    adam: Mapping[str, float]
    microbatch: int = 0

    def optimizer(self, phase: Phase) -> optax.GradientTransformation:
        return make_optimizer(phase.clip, **self.adam)

    def check_batch(self, phase: Phase, mesh: jax.sharding.Mesh) -> None:
        """Raises UserError if a phase's batch can't be split evenly over microbatches and devices."""
        meshes.check_batch(mesh, phase.batch_size, f"batch_size of phase {phase.name!r}")
        if self.microbatch:
            meshes.check_batch(mesh, self.microbatch, "microbatch")
            if phase.batch_size % self.microbatch:
                raise UserError(
                    f"microbatch {self.microbatch} does not divide batch_size {phase.batch_size} of phase "
                    f"{phase.name!r}; use a divisor, or 0 for the whole batch at once."
                )


def make_recipe(config: Any) -> Recipe:
    """The recipe of a config; raises UserError for an unknown `remat`."""
    if config.remat not in REMAT:
        raise UserError(f"remat {config.remat!r} is unknown; use one of {', '.join(REMAT)}.")
    diffusion = config.diffusion
    return Recipe(
        diffusion.sigma_data, diffusion.caption_drop, config.dtype, config.remat, dict(config.adam), config.microbatch
    )


def abstract_state_of(network: DiTConfig, phase: Phase, recipe: Recipe, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state in a phase."""
    state = abstract_state(network, recipe.optimizer(phase), phase.ema_decay > 0)
    return sharding.placed_as(state, sharding.state_shardings(mesh, state))


def lowered_arguments(
    network: DiTConfig, phase: Phase, recipe: Recipe, mesh: jax.sharding.Mesh, text_tokens: int
) -> tuple[Callable[..., Any], TrainState, dict[str, Any], Any, Any]:
    """What compiles a phase's step without making an array: the step, its abstract arguments, its out_shardings."""
    place, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    latents = (phase.batch_size, network.input_size, network.input_size, network.in_channels)
    captions = (phase.batch_size, text_tokens, network.caption_channels)
    shapes = {"latent_mean": latents, "latent_std": latents, "caption": captions}
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.float16, sharding=place) for name, shape in shapes.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    state = abstract_state_of(network, phase, recipe, mesh)
    out_shardings = (sharding.shardings_of(state), whole)
    return make_train_step(network, phase, 0, recipe, mesh), state, batch, key, out_shardings


def make_train_step(
    network: DiTConfig, phase: Phase, first_step: int, recipe: Recipe, mesh: jax.sharding.Mesh | None = None
) -> Callable[[TrainState, Mapping[str, jax.Array], jax.Array], tuple[TrainState, Metrics]]:
    """One optimizer step of a phase: (state, batch, key) → (state, metrics). `first_step` is the phase's first."""
    schedule, optimizer = phase.schedule(), recipe.optimizer(phase)
    constrain = sharding.constrain_to(mesh) if mesh is not None and mesh.size > 1 else anywhere

    def draw(batch: Mapping[str, jax.Array], key: jax.Array, step: jax.Array) -> tuple[Any, ...]:
        """Every random draw has its own stream, so that mask, noise level, noise and caption drop are independent."""
        x = batch["latent_mean"].astype(jnp.float32)  # (B, H, W, C)
        if "latent_std" in batch:  # the posterior is drawn anew at each visit
            x = x + batch["latent_std"].astype(jnp.float32) * jax.random.normal(stream(key, "posterior", step), x.shape)
        B = x.shape[0]
        dropped = jax.random.bernoulli(stream(key, "caption_drop", step), recipe.caption_drop, (B, 1, 1))
        y = jnp.where(dropped, 0, batch["caption"])  # (B, L, Y)
        sigma = edm.draw_sigma(stream(key, "sigma", step), B, phase.P_mean, phase.P_std)
        noise = jax.random.normal(stream(key, "noise", step), x.shape)
        mask = random_mask(stream(key, "mask", step), B, network.tokens, phase.mask_ratio)
        return jax.tree.map(lambda drawn: constrain(drawn, "B"), (x, y, sigma, noise, mask))

    def loss_of(params: Any, drawn: tuple[Any, ...]) -> jax.Array:
        x, y, sigma, noise, mask = drawn
        model = bind(network, params, jnp.dtype(recipe.dtype), recipe.remat, constrain)
        return edm.loss(
            lambda x, t, y: model(x, t, y, mask, phase.mask_position), x, y, sigma, noise,
            mask=mask, patch_size=network.patch_size, sigma_data=recipe.sigma_data,
        ).mean()  # fmt: skip

    def loss_and_gradients(params: Any, drawn: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        """Of the whole batch, or the mean over microbatches one after another, which is the same but for rounding."""
        parts = phase.batch_size // recipe.microbatch if recipe.microbatch else 1
        if parts == 1:
            return placed(jax.value_and_grad(loss_of)(params, drawn))

        def rows_apart(a: jax.Array) -> jax.Array:
            """(B, …) → (parts, B / parts, …): every row stays on its device, which has B / devices rows one by one."""
            return constrain(a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), "mB")

        def add(total: Any, part: tuple[Any, ...]) -> tuple[Any, None]:
            return placed(jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(params, part))), None

        zero = placed((jnp.float32(0), jax.tree.map(jnp.zeros_like, params)))
        total, _ = jax.lax.scan(add, zero, jax.tree.map(rows_apart, drawn))
        return jax.tree.map(lambda value: value / parts, total)

    def placed(loss_and_gradients: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        """Each gradient is split as its parameter is: a device needs the sum of no more than that."""
        loss, gradients = loss_and_gradients
        if mesh is not None and mesh.size > 1:
            gradients = jax.lax.with_sharding_constraint(gradients, sharding.param_shardings(mesh, gradients))
        return loss, gradients

    def train_step(
        state: TrainState, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        loss, gradients = loss_and_gradients(state.params, draw(batch, key, state.step))
        in_phase = state.step - first_step
        learning_rate = schedule(in_phase)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = update_ema(ema, params, phase.ema_decay, active=in_phase >= phase.ema_start)
        metrics = {"loss": loss, "gradient_norm": optax.global_norm(gradients), "learning_rate": learning_rate}
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return train_step


def network_of(phase: Phase, config: Any, manifest: Manifest) -> DiTConfig:
    """The phase's network: the size from the config, what goes in and out from the shards."""
    if phase.resolution % manifest.vae.downsample:
        raise UserError(f"phase {phase.name!r}: {phase.resolution} px is no multiple of {manifest.vae.downsample}.")
    overrides = {name: value for name, value in config.model.items() if value is not None and name != "size"}
    network = make_config(
        config.model.size,
        input_size=phase.resolution // manifest.vae.downsample,
        in_channels=manifest.vae.channels,
        caption_channels=manifest.text_encoder.channels,
        pos_interp_scale=phase.pos_interp_scale,
        **overrides,
    )
    network.check(phase.mask_ratio, phase.mask_position)
    return network


def prepare_shards(config: Any, phases: Sequence[Phase], say: Callable[[str], None]) -> list[Manifest]:
    """The manifest of each phase's shards; those of the embedded data are made first if they are missing.

    Raises:
        UserError: shards are missing, damaged, lack the phase's resolution, or contradict the config or each other.
    """
    data = config.data
    if data.source and "," not in data.shards and not (shards_folder(data.shards) / MANIFEST).exists():
        from micro_dit.precompute import precompute  # brings torch, which training itself has no use for

        say(f"preparing {data.shards} from {data.source} (once)")
        precompute(
            source=data.source, out=data.shards, resolutions=tuple(data.resolutions), vae=data.vae,
            text_encoder=data.text_encoder, caption_tokens=data.caption_tokens, report=say,
        )  # fmt: skip
    names = [phase.shards or data.shards for phase in phases]
    mixes = [read_mix(name) for name in names]
    manifests = [mix.manifest() for mix in mixes]
    encoders = asked_encoders(data.vae, data.text_encoder)
    for phase, mix in zip(phases, mixes, strict=True):
        mix.check(
            resolution=phase.resolution, sigma_data=config.diffusion.sigma_data, caption_tokens=data.caption_tokens,
            **encoders,
        )  # fmt: skip
    check_alike(names, manifests)
    return manifests


def asked_encoders(vae: str, text_encoder: str) -> dict[str, str]:
    """What `check_shards` shall find of the config's encoders: names, and a fingerprint of what is there to be read."""
    from micro_dit.encoders.hub import ASSETS
    from micro_dit.encoders.image import load_image_encoder

    local = Path(text_encoder).expanduser().is_dir()
    asked = {"vae": vae, "text_encoder": Path(text_encoder).expanduser().resolve().name if local else text_encoder}
    if Path(vae).expanduser().is_dir() or (ASSETS / vae).is_dir():
        encoder = load_image_encoder(vae)
        asked |= {"vae": encoder.name, "vae_fingerprint": encoder.fingerprint}
    return asked


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
    phases = make_phases(config.phases)
    starts = phase_starts(phases)
    mesh = meshes.make_mesh(config.mesh)
    recipe = make_recipe(config)
    for phase in phases:
        recipe.check_batch(phase, mesh)
    manifests = main_first(lambda: prepare_shards(config, phases, say))
    manifest = manifests[0]
    networks = [network_of(phase, config, manifest) for phase in phases]
    text = manifest.text_encoder
    about_shards = {
        "vae": manifest.vae.fingerprint, "text_encoder": text.fingerprint, "caption_tokens": text.tokens,
        "caption_cleaning": manifest.caption_cleaning, "attribution": manifest.attribution,
        "files": [m.fingerprint for m in manifests],
    }  # fmt: skip
    overview = sharding.table(mesh, abstract_params(networks[0]))
    main_first(lambda: claim_workdir(workdir, config.to_dict(), about_shards) if main_process else None)

    # 2. Say what is going to happen.
    chip = budget.chip_of(jax.devices()[0].device_kind) or budget.measure_chip()
    say(report.parameter_table(abstract_params(networks[0])))
    if mesh.size > 1:
        say(overview)
    device_price = config.cost.dollars_per_device_hour
    say(report.plan_table(networks, phases, chip, mesh.size, config.cost.mfu, device_price, text.tokens))

    # 3. Restore, or start.
    checkpoints = Checkpoints(workdir, keep_steps=tuple(starts[1:]), clean=True)

    def abstract_of(meta: Mapping[str, Any]) -> TrainState:
        return abstract_state_of(networks[meta["phase"]], phases[meta["phase"]], recipe, mesh)

    restored = checkpoints.restore(abstract_of, warn=say)
    meta: dict[str, Any]
    if restored is None:
        places = sharding.shardings_of(abstract_of({"phase": 0}))
        state = init_state(networks[0], recipe.optimizer(phases[0]), config.seed, places, phases[0].ema_decay > 0)
        meta = {"step": 0, "phase": 0, "images": 0, "seconds": 0.0, "dollars": 0.0, "data": None}
    else:
        state, meta = restored
        say(f"continuing from step {meta['step']} of {starts[-1]} ({checkpoints.folder / str(meta['step'])})")

    # 4. Train phase after phase.
    writer = MetricWriter(
        workdir, tensorboard=config.logging.tensorboard, wandb_project=config.logging.wandb_project or None,
        config=config.to_dict(), enabled=main_process,
    )  # fmt: skip
    sampling = config.sampling
    previews = main_first(lambda: Previews(
        workdir, sampling.prompts, manifest, vae=config.data.vae, text_encoder=config.data.text_encoder,
        guidance=sampling.guidance, steps=sampling.steps, sigma_data=recipe.sigma_data, dtype=recipe.dtype,
        sharding=meshes.replicated(mesh),
    ))  # fmt: skip
    price = device_price * mesh.size
    run = _Run(config, workdir, mesh, recipe, manifests, chip, price, checkpoints, writer, previews, say)
    with Interrupt() as interrupt:
        for index, (phase, network) in enumerate(zip(phases, networks, strict=True)):
            if meta["step"] >= starts[index + 1]:
                continue  # done before the restart
            if index > meta["phase"]:
                places = sharding.shardings_of(abstract_of({"phase": index}))
                state = enter_phase(state, recipe.optimizer(phase), phase.ema_decay > 0, phase.fresh_optimizer, places)
                meta |= {"phase": index, "data": None}
            state, meta = run.phase(phase, network, starts[index], state, meta, interrupt)
            if any_process(interrupt.requested) and meta["step"] < starts[-1]:
                checkpoints.close()
                writer.close()
                done = f"step {meta['step']:,} of {starts[-1]:,}"
                say(f"stopped at {done}, saved in {workdir}; to continue, run the same command again.")
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
    chip: budget.Chip
    price: float
    checkpoints: Checkpoints
    writer: MetricWriter
    previews: Previews
    say: Callable[[str], None]

    def phase(
        self, phase: Phase, network: DiTConfig, first_step: int, state: TrainState, meta: dict[str, Any],
        interrupt: Interrupt,
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
        heldout = self._heldout_loss(phase, network)
        progress = Progress(
            phase.name, phase.steps, meta["step"] - first_step, phase.batch_size,
            flops_per_image=budget.training_flops(
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
        step_function = jax.jit(
            make_train_step(network, phase, first_step, self.recipe, self.mesh),
            donate_argnums=0,
            out_shardings=(sharding.shardings_of(state), meshes.replicated(self.mesh)),
            compiler_options=compiler_options(),
        )
        compile_started = time.monotonic()
        compiled = step_function.lower(state, batch, key).compile()
        self.say(report.compilation(phase.name, compiled, time.monotonic() - compile_started))

        step, previous = meta["step"], None
        while True:
            # The order matters: dispatch the step, and only then read the metrics of the one before, so that the device
            # never waits; the iterator's position is saved before the next batch is taken, so that it fits the state.
            state, metrics = compiled(state, batch, key)
            step += 1
            if previous is not None:
                self._record(step - 1, first_step, previous, progress, phase)
            previous = metrics
            ends = step == last_step or self._told_to_stop(interrupt, step)
            saves = ends or (config.checkpoint_every and step % config.checkpoint_every == 0)
            evaluates = step == last_step or (config.evaluate_every and step % config.evaluate_every == 0)
            samples = step == last_step or (config.sampling.every and step % config.sampling.every == 0)
            if saves or evaluates or samples:
                # Nothing is saved or shown before this step's loss is known to be finite.
                self._record(step, first_step, previous, progress, phase)
                previous = None
                with progress.paused():
                    if saves:
                        self.checkpoints.save(state, meta_at(step), wait=ends)
                    if evaluates and heldout is not None:
                        scalars = heldout(state.params)
                        if state.ema is not None:
                            averaged = heldout(state.ema)
                            scalars = averaged | {
                                "heldout_loss": scalars["heldout_loss"], "heldout_loss_ema": averaged["heldout_loss"]
                            }
                        self.writer.write_scalars(step, scalars)
                    if samples:
                        grid = self.previews.draw(network, state.best_params, step)
                        if grid is not None:
                            self.writer.write_images(step, {"samples": grid})
            if ends:
                break
            batch = meshes.to_device(next(iterator), self.mesh)
        progress.close()
        return state, meta_at(step)

    def _told_to_stop(self, interrupt: Interrupt, step: int) -> bool:
        """Whether any process was; several stop at the same step. They ask now and then: the answer waits for steps."""
        if jax.process_count() > 1 and step % ASK_EVERY:
            return False
        return any_process(interrupt.requested)

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
        if self.config.logging.every and step % self.config.logging.every == 0:
            self.writer.write_scalars(step, values | progress.scalars())

    def _heldout_loss(self, phase: Phase, network: DiTConfig) -> Callable[[Any], dict[str, float]] | None:
        split = self.config.data.heldout
        shards = phase.shards or self.config.data.shards
        if not split or not read_mix(shards).manifest().records(split):
            return None
        data = load_split(shards, split, phase.resolution, self.config.data.heldout_images)
        return make_heldout_loss(
            network, data, P_mean=phase.P_mean, P_std=phase.P_std, sigma_data=self.recipe.sigma_data,
            dtype=jnp.dtype(self.recipe.dtype), sharding=meshes.replicated(self.mesh),
        )  # fmt: skip

