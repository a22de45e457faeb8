"""Contender processes, and how the benchmarks evaluate their results."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, train_step
from benchmarks.contenders import Contender, Failed, OutOfTime, Setting
from micro_dit.models.flops import training_flops
from micro_dit.planning.chips import CHIPS

SETTING = Setting("Nano", {"input_size": 8}, 0.75, batch_size=4)


@pytest.fixture
def contender() -> Iterator[Contender]:
    with Contender("tests.benchmarks.stand_in.Device", SETTING, threads=3) as contender:
        yield contender
    assert contender.process.returncode is not None


def test_contender_answers_and_reports_failures(contender: Contender) -> None:
    assert contender.ask("hello") == {"device": "stand-in"}
    answer = contender.ask("threads")
    assert answer == {"threads": "3", "pid": contender.process.pid}
    with pytest.raises(Failed, match="Out of memory"):
        contender.ask("fail")
    assert contender.ask("hello") == {"device": "stand-in"}  # the process continues after a failure
    with pytest.raises(Failed, match="exited with status 3"):
        contender.ask("end")
    with pytest.raises(Failed, match="exited with status 3"):
        contender.ask("hello")


def test_kills_contenders_after_the_deadline(contender: Contender) -> None:
    contender.ask("hello")
    started = time.monotonic()
    with pytest.raises(OutOfTime):
        contender.ask("sleep", deadline=started + 0.2, seconds=60)
    assert time.monotonic() - started < 50
    assert contender.process.returncode is not None


def rows(ours: float) -> list[dict[str, Any]]:
    """Returns rows like those of `measure` for both mask ratios; `ours` is micro_dit's CPU seconds per step."""
    seconds = {train_step.OURS: ours, train_step.EAGER: 10.0, train_step.COMPILED: 8.0}
    rest = dict(batch=16, wall_s=1.0, images_per_s=16.0, gflops_per_cpu_s=50.0, peak_gb=5.0, compile_s=9.0)
    return [
        {"contender": name, "mask": mask, "cpu_s": cpu, "compile_cpu_s": 40.0, **rest}
        for mask in train_step.MASK_RATIOS
        for name, cpu in seconds.items()
    ]


def test_ratios_are_relative_to_the_twin() -> None:
    found = train_step.ratios(rows(ours=12.0))
    assert found["mask 75%: CPU seconds, micro_dit / eager twin"] == 1.2
    assert found["mask 0%: CPU seconds, micro_dit / best of the twins"] == 1.5
    assert found["mask 0%: compiling micro_dit / a step of the eager twin, CPU seconds"] == 4.0
    assert train_step.ratios([row for row in rows(12.0) if row["contender"] == train_step.OURS]) == {}


def test_regressions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    baseline, figures = tmp_path / "baseline.json", tmp_path / "figures.json"

    def bench(ours: float, *arguments: str) -> int:
        one_mask = len(rows(ours)) // 2
        parts = iter((rows(ours)[:one_mask], rows(ours)[one_mask:]))
        monkeypatch.setattr(train_step, "measure", lambda *_: next(parts))
        monkeypatch.setattr(train_step, "twin_is_there", lambda: True)
        monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
        return train_step.main([f"--baseline={baseline}", f"--json={figures}", *arguments])

    assert bench(10.0) == 0
    assert "There is no baseline.json to compare with" in capsys.readouterr().out
    assert bench(10.0, "--update_baseline") == 0
    assert bench(10.9) == 0  # within the tolerance
    assert "regression:" not in capsys.readouterr().out
    assert bench(11.5) == 1
    printed = capsys.readouterr().out
    assert "regression: mask 75%: CPU seconds, micro_dit / eager twin is 1.15, 15% over the baseline" in printed
    assert bench(11.5, "--batch=2") == 0
    assert "Not compared with baseline.json" in capsys.readouterr().out
    assert len(json.loads(figures.read_text())["rows"]) == 6


def test_gpu_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "MODULES", dict.fromkeys(gpu.MODULES, "tests.benchmarks.stand_in"))
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    figures = tmp_path / "figures.json"

    def bench(*arguments: str) -> dict[str, Any]:
        assert gpu.main(["--dry_run", f"--json={figures}", *arguments]) == 0
        return json.loads(figures.read_text())

    results = bench("--parts", "phase 1", "sampler")
    printed = capsys.readouterr().out
    ours = results["parts"]["phase 1"]["micro_dit"]
    assert ours["images_per_s"] == pytest.approx(4 / 0.1)
    network = gpu.Bench(0.0, [], dry_run=True).setting(256, 0.75, 256, 256).network()
    flops = training_flops(network, 0.75, caption_tokens=4)
    assert ours["mfu"] == pytest.approx(40 * flops / CHIPS["h200"].peak_flops)
    assert "skipped: sampler: micro_dit: Out of memory.; twin: Out of memory." in printed
    # With --resume, complete parts are kept; without enough time, other parts are skipped.
    results["parts"]["phase 1"]["twin"]["images_per_s"] = 123.0
    figures.write_text(json.dumps(results))
    results = bench("--resume", "--parts", "phase 1", "phase 2", "--budget=10")
    assert results["parts"]["phase 1"]["twin"]["images_per_s"] == 123.0
    assert results["left_out"] == {"phase 2": "The time budget is used up."}
