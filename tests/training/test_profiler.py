import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from micro_dit.errors import UserError
from micro_dit.train import train
from micro_dit.training.metrics import read_metrics
from micro_dit.training.profiler import ProfileSettings, StepProfiler
from tests.helpers import tiny


def traced_steps(folder: Path) -> list[int]:
    """Returns the numbers of the steps in the traces of a folder."""
    traces = [json.loads(gzip.decompress(path.read_bytes())) for path in folder.rglob("*.trace.json.gz")]
    events = [event for trace in traces for event in trace["traceEvents"] if event.get("name") == "train"]
    return sorted(int(event["args"]["step_num"]) for event in events)


def run_steps(settings: ProfileSettings, folder: Path, steps: range) -> list[str]:
    """Runs steps of a small function, and returns the printed lines."""
    lines: list[str] = []
    double = jax.jit(lambda x: 2 * x)
    with StepProfiler(settings, folder, lines.append) as profiler:
        x = jnp.ones(())
        for step in steps:
            x = profiler.run(step, double, x)
    assert float(x) == 2 ** len(steps)
    return lines


def test_traces_the_requested_steps_and_prints_where(tmp_path: Path) -> None:
    (line,) = run_steps(ProfileSettings(steps=3, start=2), tmp_path, range(11, 20))
    assert f"3 steps traced in {tmp_path}" in line
    assert traced_steps(tmp_path) == [13, 14, 15]


def test_writes_a_shorter_trace_when_the_phase_ends_first(tmp_path: Path) -> None:
    (line,) = run_steps(ProfileSettings(steps=9, start=2), tmp_path, range(1, 5))
    assert "2 steps traced" in line
    assert traced_steps(tmp_path) == [3, 4]


def test_an_exception_ends_the_trace(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), StepProfiler(ProfileSettings(9, 0), tmp_path, print) as profiler:
        profiler.run(1, lambda: 1 / 0)
    assert len(run_steps(ProfileSettings(1, 0), tmp_path, range(2))) == 1  # a trace can be started again


def test_reports_when_the_phase_is_too_short_to_trace(tmp_path: Path) -> None:
    (line,) = run_steps(ProfileSettings(steps=2, start=4), tmp_path / "profile", range(4))
    assert "no trace, because only 4 steps ran and tracing starts after 4 steps. Lower --config.profile.start." in line
    assert not (tmp_path / "profile").exists()


def test_zero_steps_trace_nothing(tmp_path: Path) -> None:
    assert run_steps(ProfileSettings(), tmp_path / "profile", range(8)) == []
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("field", ["steps", "start"])
def test_negative_numbers_are_refused(field: str) -> None:
    with pytest.raises(UserError, match=rf"config\.profile\.{field} is -1\. Set --config\.profile\.{field} to 0"):
        ProfileSettings(**{field: -1})


def test_a_run_traces_each_phase_and_an_old_run_resumes_with_it(
    tiny_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    config = tiny.get_config(str(tiny_shards))
    config.model.update(depth=1, patch_mixer_depth=1)
    config.phases = tuple(dict(phase, steps=steps) for phase, steps in zip(config.phases, (4, 3), strict=True))
    config.checkpoint_every = 2
    config.profile.update(steps=2, start=1)
    workdir = train(config, tmp_path / "run")
    out = capfd.readouterr().out
    for phase, steps in (("masked", [2, 3]), ("unmasked", [6, 7])):
        assert f"2 steps traced in {workdir / 'profile' / phase}" in out
        assert traced_steps(workdir / "profile" / phase) == steps
    losses = [row["loss"] for row in read_metrics(workdir / "metrics.jsonl")]

    saved = json.loads((workdir / "config.json").read_text())
    del saved["config"]["profile"]  # as an earlier version wrote it
    (workdir / "config.json").write_text(json.dumps(saved))
    train(config, workdir)
    assert "Resuming from step 7 of 7" in capfd.readouterr().out
    assert [row["loss"] for row in read_metrics(workdir / "metrics.jsonl")] == losses
