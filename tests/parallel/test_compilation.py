import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from micro_dit.diffusion import edm
from micro_dit.models.dit import REMAT, bind
from micro_dit.parallel.compilation import compiler_options

CONFIG = tiny.network(depth=4, dim=64, use_patch_mixer=False)
PARAMS = tiny.random_params(CONFIG)


@functools.cache
def gradient(remat: str) -> jax.stages.Compiled:
    """Of the loss of 16 images, by the parameters."""
    x, t, y = tiny.inputs(CONFIG, images=16)

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return edm.loss(bind(CONFIG, params, jnp.float32, remat), x, y, jnp.exp(t), x).mean()

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
