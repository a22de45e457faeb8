"""Scalars and images of a run, in `metrics.jsonl` and in TensorBoard or Weights & Biases.

A line of `metrics.jsonl` looks like {"step": 100, "time": 1765432100.123, "loss": 0.42, "learning_rate": 0.00024}.
Infinities and NaN are written as null, which keeps every line valid JSON, and are read back as NaN.
"""

import json
import math
import pathlib
import sys
import time
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np

from micro_dit.errors import UserError
from micro_dit.files import write_atomically


class MetricWriter:
    """Writes the metrics of a run into its work directory.

    Opening the work directory of an earlier run repairs a last line torn by a kill and appends to the rest. A run that
    was killed and resumed repeats some steps; `read_metrics` keeps the last.

    Args:
        workdir: Folder of `metrics.jsonl` and `tensorboard/`; made if missing.
        tensorboard: Whether to write TensorBoard event files.
        wandb_project: Weights & Biases project to report to; None reports to none.
        config: The run's config, for Weights & Biases.
        enabled: False on every process but the first; writes nothing.

    Raises:
        UserError: Weights & Biases is not installed.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ):
        self._enabled = enabled
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if wandb_project:
            self._wandb = _start_wandb(workdir, wandb_project, config)
        if tensorboard:
            self._tensorboard = _summary_writer_class()(str(workdir / "tensorboard"), flush_secs=10)
        path = workdir / "metrics.jsonl"
        _mend_last_line(path)
        self._file = path.open("a", encoding="utf-8")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line and flushes it. The names "step" and "time" are reserved."""
        if not self._enabled:
            return
        if reserved := {"step", "time"} & set(scalars):
            raise ValueError(f"{sorted(reserved)} cannot be names of scalars: each line has them anyway")
        values = {name: float(value) for name, value in scalars.items()}
        line: dict[str, float | None] = {"step": int(step), "time": round(time.time(), 3)}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values | {"step": int(step)})

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Sends images, uint8 (H, W, 3) by name, to TensorBoard and Weights & Biases."""
        for name, image in images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise ValueError(f"{name} must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
        if self._tensorboard:
            for name, image in images.items():
                self._tensorboard.add_image(name, image, step, dataformats="HWC")
        if self._wandb:
            import wandb

            pictures = {name: wandb.Image(image) for name, image in images.items()}
            self._wandb.log(pictures | {"step": int(step)})

    def close(self) -> None:
        """Closes all files; may be called twice."""
        if self._enabled:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()
        self._enabled, self._tensorboard, self._wandb = False, None, None


def read_metrics(path: str | pathlib.Path) -> list[dict[str, float]]:
    """Reads the lines of a `metrics.jsonl`, ordered by step.

    A run that was killed and resumed repeats steps, and the first step after a start has no rate yet: the last of
    several lines counts if they share step and a name. A torn last line is left out; null becomes NaN.

    Raises:
        UserError: The file does not exist, or a line before the last is not a JSON object with a step.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"There are no metrics at {path}: train first, or give the metrics.jsonl of a run.")
    *lines, unfinished = path.read_bytes().split(b"\n")
    if _is_record(unfinished):
        lines.append(unfinished)
    steps: dict[int, list[dict[str, float]]] = {}
    for number, line in enumerate(lines, start=1):
        if not _is_record(line):
            raise UserError(f"Line {number} of {path} is no metrics record: repair or remove that line.")
        record = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
        at_step = steps.setdefault(int(record["step"]), [])
        at_step[:] = [*(other for other in at_step if other.keys() & record.keys() <= {"step", "time"}), record]
    return [record for step in sorted(steps) for record in steps[step]]


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int)


def _mend_last_line(path: pathlib.Path) -> None:
    """Completes a last line that lacks only its newline; removes one that was torn by a kill."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if _is_record(data[end:]):
            file.write(b"\n")
        else:
            file.truncate(end)


def _summary_writer_class() -> Any:
    """Imports the SummaryWriter of tensorboardX without PyTorch.

    tensorboardX imports torch, if installed, for a type annotation: seconds of start-up and a second thread pool in a
    process that trains with JAX. A None in `sys.modules` makes that import fail, which tensorboardX allows for.
    """
    imported = "torch" in sys.modules
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if not imported:
            del sys.modules["torch"]
    return SummaryWriter


def _start_wandb(workdir: pathlib.Path, project: str, config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"Reporting to the Weights & Biases project {project!r} needs its package: pip install 'micro_dit[wandb]'."
        ) from error
    # A resumed run continues the same Weights & Biases run, by the id in the work directory.
    id_file = workdir / "wandb_run_id.txt"
    if not id_file.exists():
        write_atomically(id_file, uuid.uuid4().hex[:12])
    run = wandb.init(
        project=project,
        id=id_file.read_text().strip(),
        resume="allow",
        dir=str(workdir),
        config=config and dict(config),
    )
    # The step counter of Weights & Biases may only grow, but a resumed run repeats steps: plot against the run's own.
    run.define_metric("*", step_metric="step")
    return run
