"""The benchmarks require only jax, flax, optax, numpy and torch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Required only for data preparation, checkpoints, configs and logs. Flax depends on Orbax but does not import it.
ABSENT = (
    "array_record", "clu", "grain", "matplotlib", "ml_collections", "orbax", "PIL", "safetensors", "tensorboardX",
    "tokenizers", "tqdm", "transformers",
)  # fmt: skip
PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT}))  # importing any of them raises ModuleNotFoundError
import benchmarks.contenders, benchmarks.gpu, benchmarks.growth, benchmarks.jax_jobs, benchmarks.torch_jobs
import benchmarks.train_step
"""


def test_benchmarks_do_not_import_the_data_stack() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
