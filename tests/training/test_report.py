from pathlib import Path

from micro_dit.training.metrics import MetricWriter
from micro_dit.training.report import finish

META = {"step": 6, "images": 24, "seconds": 90.0, "dollars": 0.0}


def test_what_is_there_is_told(tmp_path: Path):
    told = finish(tmp_path, [("masked", 0, 6)], META, None)  # a run that logs nothing, and draws nothing
    assert told == f"done: 6 steps, 24 images, 1.5 minutes\nin {tmp_path}: checkpoints/"
    writer = MetricWriter(tmp_path, tensorboard=False)
    for step in (3, 6):
        writer.write_scalars(step, {"loss": 1 / step, "learning_rate": 0.1})
    writer.close()
    told = finish(tmp_path, [("masked", 0, 6)], META | {"dollars": 1.5}, "a cat")
    assert "1.5 minutes, $1.50" in told
    assert "curves.png, metrics.jsonl" in told
    assert (tmp_path / "curves.png").exists()
    assert '--prompt="a cat"' in told
