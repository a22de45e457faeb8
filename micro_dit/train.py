"""The training loop. A run is a list of phases that share one work directory.

Everything a phase needs is checked before the first step. After an interrupt, a kill or a NaN, the same command resumes
from the newest complete checkpoint, bitwise.
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
    total, ends = run.starts[-1], tuple(run.starts[1:])
    checkpoints = Checkpoints(run.workdir, keep_steps=ends, keep_every=run.config.keep_every, clean=True)
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
        run.say(f"stopped at {done}, saved in {run.workdir}: resumable by running the same command again.")
    elif jax.process_index() == 0:
        spans = [(phase.name, run.starts[i], run.starts[i + 1]) for i, phase in enumerate(run.phases)]
        run.say(finish(run.workdir, spans, meta, next(iter(run.config.sampling.prompts), None)))
    return run.workdir


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
        """Trains the phase from `state` on; returns early after a signal, with everything saved."""
        run, phase, last_step = self.run, self.run.phases[self.index], self.run.starts[self.index + 1]
        iterator = self._data(meta)
        shards = phase.shards or run.config.data.shards
        evaluators = self.evaluation.evaluators(
            run.networks[self.index], phase, shards, last_step, self.saves.stop_requested
        )
        merge = functools.partial(run.recipe.trainable(run.networks[self.index]).merge, base=self.base)
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
            step += 1
            state, metrics = self.profiler.run(step, compiled, state, batch, key, self.base)
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
                    weights = Weights(state.params, state.ema, merge)
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
        step = make_train_step(run.networks[self.index], phase, run.starts[self.index], run.recipe, run.mesh)
        places = sharding.shardings_of(state), meshes.replicated(run.mesh)
        step = jax.jit(step, donate_argnums=0, out_shardings=places, compiler_options=compiler_options())
        return compile_step(phase.name, step, (state, batch, key, self.base), run.say)

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
