import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from micro_dit.planning.report import compile_step
from micro_dit.training.checkpoint import Meta
from micro_dit.training.curves import finish
from micro_dit.training.metrics import MetricWriter

META = Meta(step=6, images=24, seconds=90.0)


def test_the_summary_lists_only_existing_files(tmp_path: Path) -> None:
    summary = finish(tmp_path, [("masked", 0, 6)], META, None)  # a run without metrics and previews
    assert summary == f"Finished: 6 steps, 24 images, 1.5 minutes\nFiles in {tmp_path}: checkpoints/"
    writer = MetricWriter(tmp_path, tensorboard=False)
    for step in (3, 6):
        writer.write_scalars(step, {"loss": 1 / step, "learning_rate": 0.1})
    writer.close()
    summary = finish(tmp_path, [("masked", 0, 6)], dataclasses.replace(META, dollars=1.5), "a cat")
    assert "1.5 minutes, $1.50" in summary
    assert "curves.png, metrics.jsonl" in summary
    assert (tmp_path / "curves.png").exists()
    assert '--prompt="a cat"' in summary


def test_a_long_compilation_prints_a_heartbeat() -> None:
    @jax.jit
    def double(x: jax.Array) -> jax.Array:
        time.sleep(1.0)  # long enough for two heartbeats on a busy machine
        return 2 * x

    lines: list[str] = []
    compiled = compile_step("masked", double, [jnp.ones(3)], lines.append, every=0.05)
    assert len(lines) >= 3
    assert all(line.startswith("masked: compiling for ") for line in lines[:-1])
    assert lines[-1].startswith("masked: compiled in ")
    assert compiled(jnp.ones(3)).sum() == 6
