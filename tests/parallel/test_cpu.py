import functools
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.diffusion import edm
from micro_dit.models.config import REMAT
from micro_dit.models.dit import bind
from micro_dit.parallel import mesh as meshes
from micro_dit.parallel.cpu import compiler_options, register_lowerings
from tests.helpers import tiny

CONFIG = tiny.network(depth=4, dim=64, use_patch_mixer=False)
PARAMS = tiny.random_params(CONFIG)


@functools.cache
def gradient(remat: str) -> jax.stages.Compiled:
    """Of the loss of 16 images, by the parameters."""
    x, t, y = tiny.inputs(CONFIG, images=16)

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return edm.loss(bind(CONFIG, params, jnp.float32, remat), x, y, jnp.exp(t), x).mean()

    register_lowerings()
    return jax.jit(jax.grad(loss), compiler_options=compiler_options()).lower(PARAMS).compile()


@pytest.mark.parametrize("remat", REMAT[1:])
def test_rematerialization_changes_no_gradient(remat: str) -> None:
    expected, actual = gradient("none")(PARAMS), gradient(remat)(PARAMS)
    for name in PARAMS:
        scale = np.abs(expected[name]).max() + 1e-8
        np.testing.assert_allclose(actual[name] / scale, expected[name] / scale, atol=1e-5, err_msg=name)


def test_rematerialization_saves_memory() -> None:
    """Which it doesn't if XLA merges what is computed again with what was computed before."""
    none, dots, full = (gradient(remat).memory_analysis().temp_size_in_bytes for remat in REMAT)
    assert full < dots < 0.9 * none


def test_what_rematerialization_keeps_is_not_copied() -> None:
    assert "reduce-precision" not in gradient("dots").as_text()


def test_a_lower_precision_is_still_rounded_to() -> None:
    register_lowerings()
    rounded = jax.jit(lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))(jnp.float32(1.001))
    assert rounded == 1.0


IMPORT = """
import jax
import micro_dit.parallel.cpu


def rounds() -> bool:
    program = jax.jit(lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=23))
    return "reduce_precision" in program.lower(1.0).as_text()


assert rounds()
micro_dit.parallel.cpu.register_lowerings()
assert not rounds()
"""


def test_importing_registers_nothing() -> None:
    subprocess.run([sys.executable, "-c", IMPORT], env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True)


STEPS = """
import resource, statistics, sys
import jax, jax.numpy as jnp
from micro_dit.parallel.cpu import keep_memory

if sys.argv[1] == "kept":
    keep_memory()
step = jax.jit(lambda x: (jnp.cos(jnp.outer(x, x)) @ jnp.ones((5000, 8))).sum())  # 100 MB: no thread's heap holds that
x = jnp.ones(5000)
faults = []
for _ in range(8):
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
# The median: now and then the heap grows by one step's memory, when a small block lies in the gap.
print(statistics.median(after - before for before, after in zip(faults[:-1], faults[1:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_memory_is_kept_between_steps() -> None:
    """If they are given back, every step has the same pages cleared again."""

    def faults(how: str) -> float:
        command = [sys.executable, "-c", STEPS, how]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        return float(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") < 0.1 * faults("given back")


def test_a_batch_is_there_before_its_step_is_asked_for() -> None:
    """Or else the step would run in another thread than the one whose memory is kept."""
    batch = {"latent_mean": np.ones((8, 1_000_000), np.float16)}
    arrays = meshes.to_device(batch, meshes.make_mesh(devices=jax.devices()[:1]))
    assert arrays["latent_mean"].is_ready()
