"""The training loop. A run is a list of phases that share one work directory.

All phases are validated before the first step. After an interrupt or a kill, the same command resumes from the newest
complete checkpoint, and the result is bitwise identical to that of an uninterrupted run.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from micro_dit.data.pipeline import make_train_iterator
from micro_dit.errors import UserError
from micro_dit.evaluation.during_training import TrainingEvaluation
from micro_dit.evaluation.evaluator import Results, Weights
from micro_dit.images import save_png
from micro_dit.models.flops import training_flops
from micro_dit.parallel import mesh as meshes
from micro_dit.parallel import sharding
from micro_dit.parallel.cpu import compiler_options, register_lowerings
from micro_dit.parallel.distributed import main_first
from micro_dit.planning.report import compile_step
from micro_dit.run import Run, check, load_evaluation, report_plan, restore_or_start
from micro_dit.training.checkpoint import Checkpoints, Meta
from micro_dit.training.curves import finish
from micro_dit.training.metrics import MetricWriter
from micro_dit.training.profiler import StepProfiler
from micro_dit.training.progress import Progress
from micro_dit.training.save_schedule import Interrupt, SaveSchedule
from micro_dit.training.state import TrainState, enter_phase
from micro_dit.training.step import Metrics, make_train_step


def train(config: Any, workdir: str | Path) -> Path:
    """Trains a config, or resumes its run in the work directory.

    Args:
        config: A config as returned by configs/mask75.py.
        workdir: Work directory of the run; created if it does not exist.

    Returns:
        The absolute path of the work directory.

    Raises:
        UserError: The config, the shards or the work directory is invalid, or the loss is not finite.
    """
    # 1. Validate everything that can be validated before the first step.
    run, start = check(config, Path(workdir).absolute())

    # 2. Print the plan.
    report_plan(run)

    # 3. Restore a checkpoint, or initialize the state.
    total, ends = run.starts[-1], tuple(run.starts[1:])
    checkpoints = Checkpoints(run.workdir, keep_steps=ends, keep_every=run.config.keep_every, clean=True)
    state, meta, base = restore_or_start(run, start, checkpoints)
    del start  # frees the copy of the weights on the host

    # 4. Train the phases in order.
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
                continue  # the phase was completed before this process started
            if index > meta.phase:
                meta = dataclasses.replace(meta, phase=index, data=None)
                places = sharding.shardings_of(run.abstract_state(index))
                optimizer = run.recipe.optimizer(phase)
                state = enter_phase(state, optimizer, phase.ema_decay > 0, phase.fresh_optimizer, places)
            with StepProfiler(run.profile, run.workdir / "profile" / phase.name, run.say) as profiler:
                loop = PhaseLoop(run, index, checkpoints, writer, saves, evaluation, base, profiler)
                state, meta = loop.train(state, meta)
            if saves.stop_requested() and meta.step < total:
                break
    checkpoints.close()
    writer.close()

    # 5. Finish.
    if meta.step < total:
        done = f"step {meta.step:,} of {total:,}"
        run.say(f"Stopped at {done} and saved a checkpoint in {run.workdir}. Run the same command to resume.")
    elif jax.process_index() == 0:
        spans = [(phase.name, run.starts[i], run.starts[i + 1]) for i, phase in enumerate(run.phases)]
        run.say(finish(run.workdir, spans, meta, next(iter(run.config.sampling.prompts), None)))
    return run.workdir


@dataclasses.dataclass(frozen=True)
class PhaseLoop:
    """The loop over the steps of one phase.

    Attributes:
        run: The validated run.
        index: Index of the phase.
        checkpoints: Saves train states.
        writer: Writes metrics.
        saves: Decides when to save and when to stop.
        evaluation: Creates the evaluators of the phase.
        base: Frozen base parameters of a LoRA run; None without LoRA.
        profiler: Runs the steps, and traces some of them.
    """

    run: Run
    index: int
    checkpoints: Checkpoints
    writer: MetricWriter
    saves: SaveSchedule
    evaluation: TrainingEvaluation
    base: dict[str, jax.Array] | None
    profiler: StepProfiler

    def train(self, state: TrainState, meta: Meta) -> tuple[TrainState, Meta]:
        """Trains the phase starting from `state`; after a signal, saves a checkpoint and returns early."""
        run, phase, last_step = self.run, self.run.phases[self.index], self.run.starts[self.index + 1]
        iterator = self._data(meta)
        shards = phase.shards or run.config.data.shards
        evaluators = self.evaluation.evaluators(
            run.networks[self.index], phase, shards, last_step, self.saves.stop_requested
        )
        merge = functools.partial(run.recipe.trainable(run.networks[self.index]).merge, base=self.base)
        progress, start, started = self._progress(meta), meta, time.monotonic()

        def meta_at(step: int) -> Meta:
            """Returns the metadata after `step`; the data position is the iterator's current one."""
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
            # The order matters. The metrics of the previous step are read after this step has been dispatched, so that
            # the device never waits for the host. The iterator's position is saved before the next batch is read, so
            # that it matches the saved state.
            step += 1
            state, metrics = self.profiler.run(step, compiled, state, batch, key, self.base)
            if previous is not None:
                self._record(step - 1, previous, progress)
            previous = metrics
            saving, stopping = self.saves.after(step)
            ending = stopping or step == last_step
            due = [evaluator for evaluator in evaluators if evaluator.due(step)]
            if saving or ending or due:
                # This raises if the loss of this step is not finite, so that such a state is never saved or evaluated.
                self._record(step, previous, progress)
                previous = None
                with progress.paused():
                    if saving or ending:
                        self.checkpoints.save(state, meta_at(step).to_dict(), wait=ending)
                        self.saves.saved()
                    weights = Weights(state.params, state.ema, merge)
                    for evaluator in due:
                        if not self.saves.stop_requested():
                            self._write(step, evaluator.run(weights, step))
                    if due and not ending and self.saves.stop_requested():  # a signal arrived during an evaluation
                        ending = True
                        self.checkpoints.save(state, meta_at(step).to_dict(), wait=True)
            if ending:
                progress.close()
                return state, meta_at(step)
            batch = meshes.to_device(next(iterator), run.mesh)

    def _data(self, meta: Meta) -> Any:
        """Returns the iterator over training batches, at the position stored in `meta`."""
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
        """Returns the progress bar of the phase."""
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
        """Compiles the train step with its state donated."""
        run, phase = self.run, self.run.phases[self.index]
        register_lowerings()
        step = make_train_step(run.networks[self.index], phase, run.starts[self.index], run.recipe, run.mesh)
        places = sharding.shardings_of(state), meshes.replicated(run.mesh)
        step = jax.jit(step, donate_argnums=0, out_shardings=places, compiler_options=compiler_options())
        return compile_step(phase.name, step, (state, batch, key, self.base), run.say)

    def _record(self, step: int, metrics: Metrics, progress: Progress) -> None:
        """Displays and writes the metrics of a step.

        Raises:
            UserError: The loss or the gradient norm is not finite. The state of this step has not been saved.
        """
        run, values = self.run, {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
            progress.close()
            self.checkpoints.close()
            folder, steps = self.checkpoints.folder, self.checkpoints.steps
            kept = f"The last good checkpoint is {folder / str(steps[0])}" if steps else "No checkpoint was saved yet"
            raise UserError(
                f"Loss is {values['loss']} (gradient norm {values['gradient_norm']}) at step {step} in phase "
                f"{run.phases[self.index].name!r}. {kept}. Lower learning_rate or clip of the phase and restart in a "
                "new --workdir."
            )
        progress.update(step - run.starts[self.index], values)
        if (every := run.config.logging.every) and (step % every == 0 or step == run.starts[self.index + 1]):
            self.writer.write_scalars(step, values | progress.scalars())

    def _write(self, step: int, results: Results) -> None:
        """Writes the scalars and images of an evaluation; images are also written to PNG files."""
        if results.scalars:
            self.writer.write_scalars(step, results.scalars)
        for name, image in results.images.items():
            self.writer.write_images(step, {name: image.pixels})
            if jax.process_index() == 0:
                save_png(image.pixels, self.run.workdir / name / f"step_{step:08d}.png", image.metadata)
