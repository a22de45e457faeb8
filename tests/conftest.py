"""Options and settings that every test shares."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Optimizing machine code takes most of the time of a program that runs once or twice.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", default=str(GOLDEN), help="folder of golden tensors for tests/parity")
    parser.addoption("--kills", type=int, default=3, help="how often tests/test_resume.py kills a run")


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of noise at 64 and 128 px; see tests/tiny.py."""
    import tiny

    return tiny.write_shards(tmp_path_factory.mktemp("tiny") / "shards", (64, 128))


@pytest.fixture(scope="session")
def finished_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a tiny run that nothing disturbed; copy it before changing anything in it."""
    import tiny

    from micro_dit.train import train

    return train(tiny.get_config(str(tiny_shards)), tmp_path_factory.mktemp("finished") / "run")
