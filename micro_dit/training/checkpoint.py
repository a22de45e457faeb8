"""Saving and restoring a run with Orbax: asynchronous, atomic, and never silently different from what was saved.

One checkpoint is a folder named by its step with separate parts: params, opt, ema (where there is one) and meta: phase,
counters and the position in the data. Parameters alone can be read from it without the rest.
"""

import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from micro_dit.errors import UserError
from micro_dit.training.state import TrainState

KEEP_LATEST = 2


class Checkpoints:
    """The checkpoints of one work directory."""

    def __init__(
        self, workdir: str | Path, keep_steps: tuple[int, ...] = (), keep_latest: int = KEEP_LATEST, clean: bool = False
    ):
        """Opens (or makes) the folder `checkpoints`.

        Args:
            workdir: of the run.
            keep_steps: checkpoints at these steps are kept for good, such as the ends of phases.
            keep_latest: so many of the newest are kept besides.
            clean: remove what a killed run has left half saved. For the run itself alone: whoever reads its checkpoints
                would remove the one that it is saving.
        """
        self.folder = Path(workdir).absolute() / "checkpoints"
        policies = ocp.training.preservation_policies
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep_latest), policies.CustomSteps(list(keep_steps))]
            ),
            cleanup_tmp_directories=clean and jax.process_index() == 0,
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, newest first."""
        return sorted((int(c.step) for c in self._orbax.checkpoints), reverse=True)

    def save(self, state: TrainState, meta: Mapping[str, Any], wait: bool = False) -> None:
        """Saves in the background; a save in progress is waited for first, so none is ever skipped.

        Raises:
            UserError: no space on the disk (the checkpoints before are whole).
        """
        parts: dict[str, Any] = {"params": state.params, "opt": state.opt_state, "meta": dict(meta)}
        if state.ema is not None:
            parts["ema"] = state.ema
        try:
            self._orbax.wait()
            if int(state.step) in self.steps:
                return
            if self._orbax.save_checkpointables_async(int(state.step), parts) is None:
                raise RuntimeError(f"Orbax skipped the checkpoint of step {int(state.step)}")
            if wait:
                self._orbax.wait()
        except OSError as error:
            raise self._no_space(error) from error
        except ValueError as error:
            # tensorstore reports a full disk in its own words.
            if "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
                raise self._no_space(OSError(errno.ENOSPC, str(error))) from error
            raise

    def _no_space(self, error: OSError) -> Exception:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        whole = f"the newest whole checkpoint is step {self.steps[0]}" if self.steps else "no checkpoint is whole yet"
        return UserError(f"the disk of {self.folder} is full: {whole}; make room and run the same command again.")

    def read_meta(self, step: int) -> dict[str, Any]:
        """Phase, counters and data position of a checkpoint."""
        return self._orbax.load_checkpointables(step, {"meta": None})["meta"]

    def restore(
        self, abstract_of: Callable[[dict[str, Any]], TrainState], warn: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, with its meta; None if there is no checkpoint.

        Args:
            abstract_of: meta → the state's shapes, dtypes and shardings.
            warn: is told of a checkpoint that could not be read.

        Raises:
            UserError: there are checkpoints, but none can be read, or the newest readable one is of another network.
        """
        steps, unreadable = self.steps, []
        for step in steps:
            try:
                meta = self.read_meta(step)
                state = self._load(step, abstract_of(meta))
            except UserError:
                raise
            except Exception as error:  # whatever damage does to a file, the one before may be whole
                folder = self.folder / str(step)
                warn(f"checkpoint {folder} can't be read ({_first_line(error)}); trying the one before.")
                unreadable.append(step)
            else:
                self._set_aside(unreadable)
                return state, meta
        if steps:
            raise UserError(f"no checkpoint in {self.folder} can be read; move that folder away to start anew.")
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Moves checkpoints away that would be in the way of new ones: Orbax saves no step at or before its newest."""
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
        parts: dict[str, Any] = {"params": abstract.params, "opt": abstract.opt_state}
        if abstract.ema is not None:
            parts["ema"] = abstract.ema
        self._check(step, parts)
        loaded = self._orbax.load_checkpointables(step, parts)
        sharding = abstract.step.sharding
        return TrainState(
            jax.device_put(jnp.int32(step), sharding), loaded["params"], loaded["opt"], loaded.get("ema")
        )

    def load_params(self, step: int | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The parameters to sample from (the moving average where there is one) on the host, and the meta.

        Raises:
            UserError: there is no such checkpoint.
        """
        steps = self.steps
        if not steps or (step is not None and step not in steps):
            have = f"steps {', '.join(map(str, sorted(steps)))}" if steps else "none"
            wanted = "" if step is None else f" of step {step}"
            raise UserError(f"{self.folder} has no checkpoint{wanted} (it has {have}).")
        step = steps[0] if step is None else step
        saved = self._orbax.checkpointables_metadata(step).metadata
        part = "ema" if "ema" in saved else "params"
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # not where it was saved: that may be gone
        abstract = {n: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here) for n, m in saved[part].items()}
        loaded = self._orbax.load_checkpointables(step, {part: abstract, "meta": None})
        return {name: np.asarray(value) for name, value in loaded[part].items()}, loaded["meta"]

    def _check(self, step: int, parts: Mapping[str, Any]) -> None:
        """Orbax's own message about a mismatch is opaque, and a dtype it would cast; say what differs."""
        metadata = self._orbax.checkpointables_metadata(step).metadata
        readable = [part for part in parts if metadata.get(part) is not None]  # damage shows when it is loaded
        saved = {name: leaf for part in readable for name, leaf in _leaves({part: metadata[part]}).items()}
        wanted = {name: leaf for part in readable for name, leaf in _leaves({part: parts[part]}).items()}
        problems = [f"missing {name}" for name in wanted if name not in saved]
        problems += [f"unexpected {name}" for name in saved if name not in wanted]
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
        try:
            self._orbax.close()
        except OSError as error:
            raise self._no_space(error) from error


def _leaves(tree: Any) -> dict[str, Any]:
    """Arrays by name, such as 'opt.1.mu.layer.kernel'; Orbax has dicts and lists where the optimizer has classes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
