"""Saves and restores train states with Orbax: asynchronously, atomically, and with all shapes and dtypes checked.

A checkpoint is a folder named after its step. It holds the items params, opt, ema (if the phase has EMA weights) and
meta.
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
    """The metadata of a checkpoint: the position of the run, and the network that it trains.

    Attributes:
        step: Optimizer steps completed, over all phases.
        phase: Index of the phase.
        images: Images trained on, counting repetitions.
        seconds: Training time in seconds.
        dollars: Cost in dollars.
        data: State of the phase's data iterator; None at the start of a phase.
        model: Fields of the phase's DiTConfig.
        lora: Settings of the LoRA adapter and the origin of its base weights; None without LoRA.
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
        """Returns the metadata read from a checkpoint; unknown fields are ignored."""
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__ if name in fields})

    def to_dict(self) -> dict[str, Any]:
        """Returns the metadata as a dict for the checkpoint; `lora` is left out if it is None."""
        return {name: value for name, value in vars(self).items() if name != "lora" or value is not None}


class Checkpoints:
    """The checkpoints of one work directory."""

    def __init__(self, workdir: str | Path, keep_steps: tuple[int, ...] = (), keep_every: int = 0, clean: bool = False):
        """Opens the folder `checkpoints` of a work directory; creates it if it does not exist.

        Args:
            workdir: Work directory of the run.
            keep_steps: Steps whose checkpoints are kept in addition to the KEEP_LATEST newest.
            keep_every: Checkpoints at multiples of this step are kept too; 0 disables this.
            clean: Whether to remove partially written checkpoints of a killed run. Only the training process may set
                it, because another process would remove the checkpoint that is being saved.
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
        """Returns the steps of the complete checkpoints, newest first."""
        return sorted((int(c.step) for c in self._orbax.checkpoints), reverse=True)

    def save(self, state: TrainState, meta: Mapping[str, Any], wait: bool = False) -> None:
        """Saves a checkpoint in the background. Waits first for a save in progress, so that no save is skipped.

        Args:
            state: The train state; its step names the checkpoint. A step that is already saved is not saved again.
            meta: JSON-serializable metadata, see `Meta`.
            wait: Whether to return only when the checkpoint is complete.

        Raises:
            UserError: The disk is full. Earlier checkpoints remain complete.
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
            # tensorstore raises a ValueError without errno for a full disk, so the message has to be searched.
            words = ("No space left", "RESOURCE_EXHAUSTED")
            if getattr(error, "errno", 0) not in FULL and not any(part in str(error) for part in words):
                raise
            steps = self.steps
            newest = f"The newest complete checkpoint is step {steps[0]}" if steps else "No checkpoint is complete yet"
            raise UserError(
                f"The disk of {self.folder} is full. {newest}. Free some space and run the same command again."
            ) from error

    def read_meta(self, step: int) -> dict[str, Any]:
        """Returns the metadata of a checkpoint."""
        return self._read(step, {"meta": None})["meta"]

    def _read(self, step: int, parts: dict[str, Any]) -> dict[str, Any]:
        """Reads items of a checkpoint without a barrier, because another process may fail to read its shards."""
        me = jax.process_index()
        this_process = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
        )
        with ocp.Context(multiprocessing_options=this_process):
            return self._orbax.load_checkpointables(step, parts)

    def restore(
        self, abstract_of: Callable[[dict[str, Any]], TrainState], warn: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest checkpoint that every process can read.

        Unreadable newer checkpoints are moved to the folder `unreadable_checkpoints` of the work directory.

        Args:
            abstract_of: Returns the shapes, dtypes and shardings of the state, given the checkpoint's metadata.
            warn: Prints a warning; called for each unreadable checkpoint.

        Returns:
            The state and its metadata, or None if there are no checkpoints.

        Raises:
            UserError: No checkpoint can be read, or the newest readable one does not match `abstract_of`.
        """
        unreadable: list[int] = []
        for step in self.steps:
            damage = ""
            try:
                meta = self.read_meta(step)
                state = self._load(step, abstract_of(meta))
            except UserError:
                raise
            except Exception as error:  # a damaged file can raise any exception; the previous checkpoint may be intact
                damage = _first_line(error)
            if not any_process(bool(damage)):
                self._set_aside(unreadable)
                return state, meta
            reason = damage or "another process failed to"
            warn(f"Checkpoint {self.folder / str(step)} can't be read ({reason}). Trying the previous checkpoint.")
            unreadable.append(step)
        if unreadable:
            raise UserError(
                f"No checkpoint in {self.folder} can be read. Move this folder away, or set another --workdir, to "
                "restart from step 0."
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Moves checkpoints away, because Orbax does not save a step at or before its newest checkpoint."""
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
        """Reads the parameters for sampling into host memory.

        Args:
            step: Step of the checkpoint; None reads the newest.
            params: 'ema' or 'raw'; None reads the EMA weights if the checkpoint has them.

        Returns:
            The parameters by name, and the metadata of the checkpoint.

        Raises:
            UserError: The checkpoint does not exist, or has no EMA weights although `params` is 'ema'.
        """
        if params not in (None, "ema", "raw"):
            raise UserError(f"params is {params!r}, but must be 'ema' or 'raw'. Set --params=ema or --params=raw.")
        steps = self.steps
        if not steps:
            raise UserError(f"{self.folder} has no checkpoints. Train for some steps first.")
        if step is not None and step not in steps:
            available = ", ".join(map(str, sorted(steps)))
            raise UserError(f"{self.folder} has no checkpoint of step {step}. Set --step to one of {available}.")
        step = steps[0] if step is None else step
        saved = self._orbax.checkpointables_metadata(step).metadata
        if params == "ema" and "ema" not in saved:
            raise UserError(f"Checkpoint {self.folder / str(step)} has no EMA weights. Set --params=raw.")
        part = "ema" if "ema" in saved and params != "raw" else "params"
        # The devices that the checkpoint was saved from may not exist in this process.
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = {n: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device) for n, m in saved[part].items()}
        loaded = self._read(step, {part: abstract, "meta": None})
        return {name: np.asarray(value) for name, value in loaded[part].items()}, loaded["meta"]

    def _check(self, step: int, parts: Mapping[str, Any]) -> None:
        """Raises UserError if names, shapes or dtypes differ from a checkpoint's; Orbax would silently cast dtypes."""
        metadata = self._orbax.checkpointables_metadata(step).metadata
        readable = [part for part in parts if metadata.get(part) is not None]  # damaged items fail when they are loaded
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
                f"Checkpoint {self.folder / str(step)} does not match the config: {'; '.join(problems[:5])}{more}. "
                "Use the config that it was trained with, or another --workdir."
            )

    def close(self) -> None:
        """Waits for a save in progress and closes the folder."""
        with self._full_disk_as_user_error():
            self._orbax.close()


def _parts(state: TrainState) -> dict[str, Any]:
    parts = {"params": state.params, "opt": state.opt_state}
    return parts if state.ema is None else parts | {"ema": state.ema}


def _leaves(tree: Any) -> dict[str, Any]:
    """Returns arrays by name, such as 'opt.1.mu.layer.kernel'. Orbax's dicts and Optax's classes have equal names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
