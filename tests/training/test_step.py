"""The parts of the train step. tests/test_train.py tests its randomness and its schedule."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.training.step import accumulate_gradients

PROGRAM = """
import sys
for name in ("grain", "array_record", "orbax", "ml_collections", "clu", "PIL", "transformers", "tqdm", "torch"):
    sys.modules[name] = None  # importing it raises ImportError

import jax
import jax.numpy as jnp
import numpy as np

from micro_dit.models.config import make_config
from micro_dit.training.phases import Phase
from micro_dit.training.recipe import Recipe
from micro_dit.training.state import init_state
from micro_dit.training.step import make_train_step

network = make_config("Nano", dim=32, depth=1, head_dim=16, use_patch_mixer=False, input_size=4, caption_channels=8)
phase = Phase("tiny", resolution=32, steps=1, batch_size=2, learning_rate=1e-3, mask_ratio=0.5)
recipe = Recipe(sigma_data=0.9, caption_drop=0.1, dtype="float32", remat="none", adam={})
state = init_state(recipe.trainable(network), recipe.optimizer(phase), 0, None, with_ema=False)
batch = {"latent_mean": np.ones((2, 4, 4, 4), np.float16), "caption": np.ones((2, 3, 8), np.float16)}
state, metrics = jax.jit(make_train_step(network, phase, 0, recipe))(state, batch, jax.random.key(0))
assert int(state.step) == 1 and jnp.isfinite(metrics["loss"])
"""


def test_a_step_requires_only_jax_flax_optax_and_numpy() -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_accumulated_gradients_equal_those_of_the_whole_batch(parts: int) -> None:
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.standard_normal((3, 2), np.float32)), "b": jnp.zeros(2)}
    batch = {name: generator.standard_normal((12, n), np.float32) for name, n in (("x", 3), ("y", 2))}
    sizes, placed = [], []

    def loss(params: dict[str, jax.Array], part: dict[str, jax.Array]) -> jax.Array:
        sizes.append(len(part["x"]))
        return jnp.mean((jnp.tanh(part["x"] @ params["w"] + params["b"]) - part["y"]) ** 2)

    def place(gradients: dict[str, jax.Array]) -> dict[str, jax.Array]:
        placed.append(gradients)
        return gradients

    found = accumulate_gradients(loss, params, batch, parts, place=place)
    assert set(sizes) == {12 // parts}
    assert placed
    expected = jax.value_and_grad(loss)(params, batch)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7), found, expected)
