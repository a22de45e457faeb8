"""Options, environment settings and fixtures that all tests share."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation dominates the time of programs that run once or twice. Optimization is therefore disabled, and XLA's older
# emitters, which take half the time, are used if this version has them. Other versions abort on the unknown flag.
XLA_FLAGS = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(XLA_FLAGS))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

GOLDEN = Path(__file__).parent / "golden"
# The longest tests run first, so that several workers finish at about the same time.
LONGEST = (
    "test_train", "parity/test_network", "test_resume", "test_evaluate", "playground/test_playground",
    "parity/test_full_size", "multidevice/test_processes", "launch/test_notebooks", "test_sample",
    "multidevice/test_sharded", "test_export", "test_finetune", "test_four_ways", "test_rehearse", "test_configs",
    "encoders/test_published_sizes", "test_old_runs",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", default=str(GOLDEN), help="folder of golden tensors for tests/parity")
    parser.addoption("--kills", type=int, default=3, help="number of times that tests/test_resume.py kills a run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"tests/{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of random noise at 64 and 128 px; see tests/helpers/tiny.py."""
    from tests.helpers import tiny

    return tiny.write_shards(tmp_path_factory.mktemp("tiny") / "shards", (64, 128))


@pytest.fixture(scope="session")
def finished_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of an uninterrupted tiny run. Tests must copy it before they modify it."""
    from micro_dit.train import train
    from tests.helpers import tiny

    return train(tiny.get_config(str(tiny_shards)), tmp_path_factory.mktemp("finished") / "run")
