"""The metrics file remains valid JSON after kills and resumes."""

import json
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Never

import numpy as np
import pytest

from micro_dit.errors import UserError
from micro_dit.training.metrics import MetricWriter, read_metrics


def write(workdir: Path, records: Any, **options: Any) -> Path:
    writer = MetricWriter(workdir, tensorboard=False, **options)
    for step, scalars in records:
        writer.write_scalars(step, scalars)
    writer.close()
    return workdir / "metrics.jsonl"


def test_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path / "new", [(1, {"loss": 0.5}), (2, {"loss": np.float32(0.25), "learning_rate": 1e-4})])
    first, second = read_metrics(path)
    assert first.pop("time") > 1e9
    assert first == {"step": 1, "loss": 0.5}
    assert second["loss"] == 0.25
    assert second["learning_rate"] == 1e-4


def test_each_line_is_flushed_immediately(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, tensorboard=False)
    writer.write_scalars(1, {"loss": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 0.5  # while the writer is still open
    writer.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_written_as_null_and_read_as_nan(tmp_path: Path, value: float) -> None:
    path = write(tmp_path, [(1, {"loss": value})])

    def reject(constant: str) -> Never:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=reject)["loss"] is None
    assert math.isnan(read_metrics(path)[0]["loss"])


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_an_incomplete_last_line_is_repaired(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, [(1, {"loss": 0.5}), (2, {"loss": 0.4})])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])  # as after a kill; with cut = 1, only the newline is missing
    kept = 2 if cut == 1 else 1
    assert len(read_metrics(path)) == kept
    write(tmp_path, [(3, {"loss": 0.3})])
    assert [record["step"] for record in read_metrics(path)] == [*range(1, kept + 1), 3]
    assert path.read_bytes().startswith(b"\n".join(whole.split(b"\n")[:kept]) + b"\n")


def test_a_complete_file_is_not_modified_when_it_is_reopened(tmp_path: Path) -> None:
    path = write(tmp_path, [(1, {"loss": 0.5})])
    before = path.read_bytes()
    write(tmp_path, [])
    assert path.read_bytes() == before


def test_the_last_line_of_a_repeated_step_is_used(tmp_path: Path) -> None:
    twice = (2, {"loss": 2.0, "images_per_second": 9.0})
    write(tmp_path, [(1, {"loss": 1.0}), twice, (2, {"heldout_loss": 7.0}), (4, {"loss": 4.0})])
    path = write(tmp_path, [(2, {"loss": 20.0}), (3, {"loss": 30.0})])
    records = read_metrics(path)
    assert [record["step"] for record in records] == [1, 2, 2, 3, 4]
    assert [record["loss"] for record in records if "loss" in record] == [1.0, 20.0, 30.0, 4.0]
    assert [record["heldout_loss"] for record in records if "heldout_loss" in record] == [7.0]
    assert len(path.read_text().splitlines()) == 6  # the file keeps all lines


def test_an_invalid_line_in_the_middle_is_reported_with_its_number(tmp_path: Path) -> None:
    path = write(tmp_path, [(1, {"loss": 1.0}), (2, {"loss": 2.0})])
    path.write_text("gibberish\n" + path.read_text())
    with pytest.raises(UserError, match=r"Line 1 of .*metrics\.jsonl"):
        read_metrics(path)
    with pytest.raises(UserError, match="no metrics"):
        read_metrics(tmp_path / "elsewhere.jsonl")


def test_a_disabled_writer_writes_no_files(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path / "run", wandb_project="p", enabled=False)
    writer.write_scalars(1, {"loss": 1.0})
    writer.write_images(1, {"grid": np.zeros((4, 4, 3), np.uint8)})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_reserved_names_and_invalid_images_are_rejected(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match="step"):
        writer.write_scalars(1, {"step": 3.0})
    with pytest.raises(ValueError, match="uint8"):
        writer.write_images(1, {"grid": np.zeros((4, 4, 3), np.float32)})
    writer.close()


def test_tensorboard_receives_scalars_and_images_without_importing_torch(tmp_path: Path) -> None:
    code = f"""
import sys
import numpy as np
from micro_dit.training.metrics import MetricWriter
writer = MetricWriter({str(tmp_path)!r})
assert not [name for name in sys.modules if name.split('.')[0] in ('torch', 'tensorflow')]
writer.write_scalars(3, {{"loss": 0.5}})
writer.write_images(3, {{"grid": np.zeros((4, 5, 3), np.uint8)}})
writer.close()
import torch  # can still be imported afterwards
assert torch.ones(1).sum() == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)

    from tensorboardX.proto.event_pb2 import Event

    (path,) = (tmp_path / "tensorboard").iterdir()
    data, seen = path.read_bytes(), dict[Any, Any]()
    while data:  # a record consists of a length, its checksum, the event and its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        seen |= {value.tag: (event.step, value) for value in event.summary.value}
        data = data[16 + length :]
    assert seen["loss"][0] == 3
    assert seen["loss"][1].simple_value == 0.5
    assert (seen["grid"][1].image.height, seen["grid"][1].image.width) == (4, 5)


def test_the_error_for_missing_wandb_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'micro_dit\[wandb\]'"):
        MetricWriter(tmp_path, tensorboard=False, wandb_project="faces")


def test_a_resumed_run_continues_the_same_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        def __init__(self, **options: Any) -> None:
            self.options, self.logged, self.finished = options, list[Any](), False
            self.define_metric = lambda name, step_metric: None
            runs.append(self)

        def log(self, values: dict[str, Any]) -> None:
            self.logged.append(values)

        def finish(self) -> None:
            self.finished = True

    runs: list[Any] = []
    wandb = types.SimpleNamespace(init=Run, Image=lambda image: ("image", image.shape))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):
        writer = MetricWriter(tmp_path, tensorboard=False, wandb_project="faces", config={"seed": 1})
        writer.write_scalars(5, {"loss": math.inf})
        writer.write_images(5, {"grid": np.zeros((2, 3, 3), np.uint8)})
        writer.close()
    assert runs[0].options["id"] == runs[1].options["id"]
    assert runs[0].options["project"] == "faces"
    assert runs[0].options["config"] == {"seed": 1}
    assert runs[0].logged == [{"loss": math.inf, "step": 5}, {"grid": ("image", (2, 3, 3)), "step": 5}]
    assert runs[0].finished
