"""Writes scalars and images of a run to `metrics.jsonl`, TensorBoard and Weights & Biases.

A line of `metrics.jsonl` looks like {"step": 100, "time": 1765432100.123, "loss": 0.42, "learning_rate": 0.00024}.
Infinities and NaN are written as null, because JSON has no numbers for them, and are read back as NaN.
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

    If the work directory already has metrics, new lines are appended, after an incomplete last line has been repaired.
    A run that was killed and resumed repeats some steps; `read_metrics` keeps the latest values.

    Args:
        workdir: Folder of `metrics.jsonl` and `tensorboard/`; created if it does not exist.
        tensorboard: Whether to write TensorBoard event files.
        wandb_project: Weights & Biases project to report to; None disables reporting.
        config: The run's config, sent to Weights & Biases.
        enabled: Whether to write anything; only process 0 does.

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
        """Appends one line to `metrics.jsonl` and flushes it. The names "step" and "time" are reserved."""
        if not self._enabled:
            return
        if reserved := {"step", "time"} & set(scalars):
            raise ValueError(f"Scalars must not be named {sorted(reserved)}, because every line has these fields.")
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
        """Writes images, (H, W, 3) uint8 by name, to TensorBoard and Weights & Biases."""
        for name, image in images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise ValueError(f"{name} must be (H, W, 3) uint8, but is {image.shape} {image.dtype}.")
        if self._tensorboard:
            for name, image in images.items():
                self._tensorboard.add_image(name, image, step, dataformats="HWC")
        if self._wandb:
            import wandb

            wandb_images = {name: wandb.Image(image) for name, image in images.items()}
            self._wandb.log(wandb_images | {"step": int(step)})

    def close(self) -> None:
        """Closes all files. Calling it again has no effect."""
        if self._enabled:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()
        self._enabled, self._tensorboard, self._wandb = False, None, None


def read_metrics(path: str | pathlib.Path) -> list[dict[str, float]]:
    """Reads the records of a `metrics.jsonl`, ordered by step.

    A run that was killed and resumed repeats steps. Of several lines with the same step and a scalar in common, only
    the last is returned. An incomplete last line is ignored; null becomes NaN.

    Raises:
        UserError: The file does not exist, or a line before the last is not a JSON object with a step.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"There are no metrics at {path}. Train for some steps first, or use the path of another run.")
    *lines, unfinished = path.read_bytes().split(b"\n")
    if _is_record(unfinished):
        lines.append(unfinished)
    steps: dict[int, list[dict[str, float]]] = {}
    for number, line in enumerate(lines, start=1):
        if not _is_record(line):
            raise UserError(f"Line {number} of {path} is not a metrics record. Repair or remove this line.")
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
    """Repairs the last line after a kill: adds a missing newline, or removes an incomplete record."""
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
    """Imports tensorboardX's SummaryWriter without importing PyTorch.

    If PyTorch is installed, tensorboardX imports it for a type annotation. That adds seconds of start-up time and a
    second thread pool to the process. A None in `sys.modules` lets this import fail, which tensorboardX handles.
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
            f"logging.wandb_project is {project!r}, but the wandb package is not installed. Run: pip install "
            "'micro_dit[wandb]'."
        ) from error
    # The id is stored in the work directory, so that a resumed run continues the same Weights & Biases run.
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
    # A resumed run repeats steps, but the built-in step of Weights & Biases cannot decrease. Plots use our own step.
    run.define_metric("*", step_metric="step")
    return run
