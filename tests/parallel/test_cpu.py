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
    """Compiles the gradient of the loss of 16 images with respect to the parameters."""
    x, t, y = tiny.inputs(CONFIG, images=16)

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return edm.loss(bind(CONFIG, params, jnp.float32, remat), x, y, jnp.exp(t), x).mean()

    register_lowerings()
    return jax.jit(jax.grad(loss), compiler_options=compiler_options()).lower(PARAMS).compile()


@pytest.mark.parametrize("remat", REMAT[1:])
def test_rematerialization_does_not_change_gradients(remat: str) -> None:
    expected, actual = gradient("none")(PARAMS), gradient(remat)(PARAMS)
    for name in PARAMS:
        scale = np.abs(expected[name]).max() + 1e-8
        np.testing.assert_allclose(actual[name] / scale, expected[name] / scale, atol=1e-5, err_msg=name)


def test_rematerialization_saves_memory() -> None:
    """Fails if XLA merges the recomputed activations with the original ones."""
    none, dots, full = (gradient(remat).memory_analysis().temp_size_in_bytes for remat in REMAT)
    assert full < dots < 0.9 * none


def test_activations_saved_by_rematerialization_are_not_copied() -> None:
    assert "reduce-precision" not in gradient("dots").as_text()


def test_rounding_to_a_lower_precision_is_kept() -> None:
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


def test_importing_the_module_registers_no_lowering() -> None:
    subprocess.run([sys.executable, "-c", IMPORT], env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True)


STEPS = """
import resource, statistics, sys
import jax, jax.numpy as jnp
from micro_dit.parallel.cpu import keep_memory

if sys.argv[1] == "kept":
    keep_memory()
step = jax.jit(lambda x: (jnp.cos(jnp.outer(x, x)) @ jnp.ones((5000, 8))).sum())  # 100 MB: too much for a thread's heap
x = jnp.ones(5000)
faults = []
for _ in range(8):
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
# The median is used because fragmentation occasionally lets the heap grow by the memory of one step.
print(statistics.median(after - before for before, after in zip(faults[:-1], faults[1:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="requires glibc")
def test_keep_memory_avoids_page_faults() -> None:
    """Without it, freed pages are returned to the system, and every step has page faults for them."""

    def faults(mode: str) -> float:
        command = [sys.executable, "-c", STEPS, mode]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        return float(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") < 0.1 * faults("default")


def test_a_batch_is_ready_before_its_step_is_dispatched() -> None:
    """Otherwise the step would run in a thread whose heap does not keep the memory."""
    batch = {"latent_mean": np.ones((8, 1_000_000), np.float16)}
    arrays = meshes.to_device(batch, meshes.make_mesh(devices=jax.devices()[:1]))
    assert arrays["latent_mean"].is_ready()
