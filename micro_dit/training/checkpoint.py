"""Saves and restores a run with Orbax: asynchronously, atomically, and with all shapes and dtypes checked.

A checkpoint is a folder named by its step with separate parts: params, opt, ema (if the phase has one) and meta.
"""

import contextlib
import dataclasses
import errno
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from micro_dit.errors import UserError
from micro_dit.parallel.distributed import any_process
from micro_dit.training.state import TrainState

KEEP_LATEST = 2
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclasses.dataclass(frozen=True)
class Meta:
    """The position of a run, saved with each of its states.

    Attributes:
        step: Optimizer steps done, over all phases.
        phase: Number of the phase.
        images: Images trained on.
        seconds: Time spent training.
        dollars: Money spent.
        data: State of the phase's data iterator; None at the start of a phase.
        model: Fields of the phase's network.
        lora: Settings of a LoRA adapter and the origin of the weights under it; None without LoRA.
    """

    step: int = 0
    phase: int = 0
    images: int = 0
    seconds: float = 0.0
    dollars: float = 0.0
    data: Any = None
    model: Mapping[str, Any] | None = None
    lora: Mapping[str, Any] | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Meta":
        """Reads the meta of a checkpoint."""
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__ if name in fields})

    def to_dict(self) -> dict[str, Any]:
        """Returns the meta to be saved."""
        return {name: value for name, value in vars(self).items() if name != "lora" or value is not None}


class Checkpoints:
    """The checkpoints of one work directory."""

    def __init__(self, workdir: str | Path, keep_steps: tuple[int, ...] = (), keep_every: int = 0, clean: bool = False):
        """Opens (or makes) the folder `checkpoints`.

        Args:
            workdir: Work directory of the run.
            keep_steps: Steps whose checkpoints are never removed, besides the KEEP_LATEST newest.
            keep_every: Multiples of this step are never removed either; 0 for none.
            clean: Whether to remove what a killed run has left half saved. Only for the run itself: a reader would
                remove the checkpoint that the run is saving.
        """
        self.folder = Path(workdir).absolute() / "checkpoints"
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(KEEP_LATEST), policies.CustomSteps(list(keep_steps))]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=clean and jax.process_index() == 0,
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first."""
        return sorted((int(c.step) for c in self._orbax.checkpoints), reverse=True)

    def save(self, state: TrainState, meta: Mapping[str, Any], wait: bool = False) -> None:
        """Saves in the background, after a save in progress, so that none is ever skipped.

        Raises:
            UserError: The disk is full. Earlier checkpoints are complete.
        """
        parts = _parts(state) | {"meta": dict(meta)}
        with self._full_disk_as_user_error():
            self._orbax.wait()
            if int(state.step) in self.steps:
                return
            if self._orbax.save_checkpointables_async(int(state.step), parts) is None:
                raise RuntimeError(f"Orbax skipped the checkpoint of step {int(state.step)}")
            if wait:
                self._orbax.wait()

    @contextlib.contextmanager
    def _full_disk_as_user_error(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            # tensorstore reports a full disk in its own words.
            words = ("No space left", "RESOURCE_EXHAUSTED")
            if getattr(error, "errno", 0) not in FULL and not any(part in str(error) for part in words):
                raise
            steps = self.steps
            whole = f"the newest whole checkpoint is step {steps[0]}" if steps else "no checkpoint is whole yet"
            raise UserError(
                f"the disk of {self.folder} is full: {whole}; make room and run the same command again."
            ) from error

    def read_meta(self, step: int) -> dict[str, Any]:
        """Returns the meta of a checkpoint."""
        return self._read(step, {"meta": None})["meta"]

    def _read(self, step: int, parts: dict[str, Any]) -> dict[str, Any]:
        """Reads parts of a checkpoint without waiting for other processes, which may fail to read theirs."""
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
        )
        with ocp.Context(multiprocessing_options=alone):
            return self._orbax.load_checkpointables(step, parts)

    def restore(
        self, abstract_of: Callable[[dict[str, Any]], TrainState], warn: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest checkpoint that every process can read, with its meta; None if there is none.

        Args:
            abstract_of: meta → the state's shapes, dtypes and shardings.
            warn: Prints a warning, for each unreadable checkpoint.

        Raises:
            UserError: No checkpoint can be read, or the newest readable one is of another network.
        """
        unreadable: list[int] = []
        for step in self.steps:
            damage = ""
            try:
                meta = self.read_meta(step)
                state = self._load(step, abstract_of(meta))
            except UserError:
                raise
            except Exception as error:  # whatever damage does to a file, the one before may be whole
                damage = _first_line(error)
            if not any_process(bool(damage)):
                self._set_aside(unreadable)
                return state, meta
            reason = damage or "another process failed to"
            warn(f"checkpoint {self.folder / str(step)} can't be read ({reason}); trying the one before.")
            unreadable.append(step)
        if unreadable:
            raise UserError(f"no checkpoint in {self.folder} can be read; move that folder away to start anew.")
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Moves checkpoints away: Orbax saves no step at or before its newest."""
        for step in steps if jax.process_index() == 0 else ():
            aside = self.folder.with_name("unreadable_checkpoints") / str(step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(aside)
        if steps:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("unreadable checkpoints are moved")
            self._orbax.reload()

    def _load(self, step: int, abstract: TrainState) -> TrainState:
        parts = _parts(abstract)
        self._check(step, parts)
        loaded = self._read(step, parts)
        counter = jax.make_array_from_callback((), abstract.step.sharding, lambda index: np.asarray(step, np.int32))
        return TrainState(counter, loaded["params"], loaded["opt"], loaded.get("ema"))

    def has_average(self, step: int) -> bool:
        """Returns whether a checkpoint holds EMA weights."""
        return "ema" in self._orbax.checkpointables_metadata(step).metadata

    def load_params(
        self, step: int | None = None, params: str | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Reads the parameters to sample with, on the host, and the meta.

        Args:
            step: Step of the checkpoint; None reads the newest.
            params: 'ema' or 'raw'; None reads the EMA weights if there are any.

        Raises:
            UserError: The checkpoint does not exist, or has no EMA weights.
        """
        if params not in (None, "ema", "raw"):
            raise UserError(f"there are no parameters {params!r}; choose ema or raw.")
        steps = self.steps
        if not steps or (step is not None and step not in steps):
            have = f"steps {', '.join(map(str, sorted(steps)))}" if steps else "none"
            wanted = "" if step is None else f" of step {step}"
            raise UserError(f"{self.folder} has no checkpoint{wanted} (it has {have}).")
        step = steps[0] if step is None else step
        saved = self._orbax.checkpointables_metadata(step).metadata
        if params == "ema" and "ema" not in saved:
            raise UserError(f"the checkpoint of step {step} in {self.folder} has no moving average: use raw.")
        part = "ema" if "ema" in saved and params != "raw" else "params"
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # not where it was saved: that may be gone
        abstract = {n: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here) for n, m in saved[part].items()}
        loaded = self._read(step, {part: abstract, "meta": None})
        return {name: np.asarray(value) for name, value in loaded[part].items()}, loaded["meta"]

    def _check(self, step: int, parts: Mapping[str, Any]) -> None:
        """Raises UserError if a checkpoint has other names, shapes or dtypes; Orbax would cast a dtype silently."""
        metadata = self._orbax.checkpointables_metadata(step).metadata
        readable = [part for part in parts if metadata.get(part) is not None]  # damage shows when it is loaded
        saved = {name: leaf for part in readable for name, leaf in _leaves({part: metadata[part]}).items()}
        wanted = {name: leaf for part in readable for name, leaf in _leaves({part: parts[part]}).items()}
        problems = [f"missing {name}" for name in wanted if name not in saved]
        problems += [f"unexpected {name}" for name in saved if name not in wanted]
        problems += [f"unexpected {part}" for part in metadata if part not in parts and part != "meta"]
        problems += [
            f"{name} is {saved[name].shape} {saved[name].dtype}, expected {leaf.shape} {leaf.dtype}"
            for name, leaf in wanted.items()
            if name in saved and (tuple(saved[name].shape), saved[name].dtype) != (tuple(leaf.shape), leaf.dtype)
        ]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise UserError(
                f"checkpoint {self.folder / str(step)} is of another network: {'; '.join(problems[:5])}{more}; "
                "use the config that it was trained with, or another --workdir."
            )

    def close(self) -> None:
        """Waits for a save in progress."""
        with self._full_disk_as_user_error():
            self._orbax.close()


def _parts(state: TrainState) -> dict[str, Any]:
    parts = {"params": state.params, "opt": state.opt_state}
    return parts if state.ema is None else parts | {"ema": state.ema}


def _leaves(tree: Any) -> dict[str, Any]:
    """Returns arrays by name, such as 'opt.1.mu.layer.kernel', alike for Orbax's dicts and the optimizer's classes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
