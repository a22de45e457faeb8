"""Compares expert choice with an implementation by one-hot matrices and loops."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from micro_dit.models.config import tokens_per_expert
from micro_dit.models.moe import ExpertChoiceFFN

B, N, D, HIDDEN = 3, 12, 8, 16


def layer(experts: int, capacity: float) -> tuple[nnx.GraphDef, nnx.State]:
    module = ExpertChoiceFFN(D, HIDDEN, experts, capacity, out_std=0.5, dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    keys = iter(jax.random.split(jax.random.key(1), 3))
    return graphdef, jax.tree.map(lambda leaf: 0.5 * jax.random.normal(next(keys), leaf.shape), state)


def by_one_hot(module: ExpertChoiceFFN, x: jax.Array) -> jax.Array:
    """Computes the layer with one-hot matrices, one image and one expert at a time."""
    T = int(module.capacity * x.shape[1] / module.experts)
    images = []
    for tokens in x:
        probabilities = jax.nn.softmax(tokens @ module.gate.kernel[...], axis=-1)  # (N, E)
        out = jnp.zeros_like(tokens)
        for expert in range(module.experts):
            chosen = jnp.argsort(-probabilities[:, expert])[:T]
            dispatch = jax.nn.one_hot(chosen, tokens.shape[0])  # (T, N)
            hidden = jax.nn.gelu(dispatch @ tokens @ module.w1[...][expert], approximate=False)
            scale = dispatch @ probabilities[:, expert]
            out += dispatch.T @ (scale[:, None] * (hidden @ module.w2[...][expert]))
        images.append(out)
    return jnp.stack(images)


@pytest.mark.parametrize(("experts", "capacity"), [(2, 1.0), (4, 2.0), (4, 0.5), (3, 3.0)])
def test_values_and_gradients_match_one_hot_products(experts: int, capacity: float) -> None:
    graphdef, state = layer(experts, capacity)
    x, weights = jax.random.normal(jax.random.key(2), (2, B, N, D))

    def total(function: Callable[..., jax.Array], state: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(nnx.merge(graphdef, state), x)
        return jnp.sum(out * weights), out

    results = [
        jax.jit(jax.value_and_grad(functools.partial(total, function), (0, 1), has_aux=True))(state, x)
        for function in (lambda module, x: module(x), by_one_hot)
    ]
    ((_, ours), our_gradients), ((_, theirs), their_gradients) = results
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), our_gradients, their_gradients)


def test_tokens_that_no_expert_chose_are_zero() -> None:
    graphdef, state = layer(experts=2, capacity=0.5)  # each expert chooses 3 of 12 tokens
    x = jax.random.normal(jax.random.key(3), (B, N, D))
    module = nnx.merge(graphdef, state)
    chosen, probabilities = module.route(x)
    assert chosen.shape == probabilities.shape == (B, 2, 3)
    out = np.asarray(module(x))
    for image in range(B):
        taken = set(np.asarray(chosen[image]).ravel().tolist())
        others = sorted(set(range(N)) - taken)
        assert others
        np.testing.assert_array_equal(out[image, others], 0)
        assert np.all(np.any(out[image, sorted(taken)] != 0, axis=-1))


def test_each_expert_chooses_its_most_probable_tokens_of_each_image() -> None:
    graphdef, state = layer(experts=4, capacity=2.0)
    module = nnx.merge(graphdef, state)
    x = jax.random.normal(jax.random.key(4), (B, N, D))
    probabilities = np.asarray(jax.nn.softmax(x @ module.gate.kernel[...], axis=-1))
    chosen, taken = map(np.asarray, module.route(x))
    for image in range(B):
        for expert in range(4):
            expected = np.sort(probabilities[image, :, expert])[::-1][:6]
            np.testing.assert_allclose(taken[image, expert], expected, rtol=1e-6)
            assert len(set(chosen[image, expert])) == 6


def test_images_do_not_influence_each_other() -> None:
    graphdef, state = layer(experts=4, capacity=1.0)
    module = nnx.merge(graphdef, state)
    x = jax.random.normal(jax.random.key(5), (B, N, D))
    np.testing.assert_allclose(module(x)[1], module(x[1:2])[0], atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "experts", "capacity", "T"), [(256, 8, 2.0, 64), (4, 8, 2.0, 1), (3, 8, 2.0, 0), (10, 3, 1.0, 3)]
)
def test_tokens_per_expert_rounds_down(tokens: int, experts: int, capacity: float, T: int) -> None:
    assert tokens_per_expert(tokens, experts, capacity) == T


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_router_product_has_full_float32_precision(dtype: jnp.dtype) -> None:
    graphdef, state = layer(experts=4, capacity=2.0)
    x = jnp.ones((B, N, D), dtype)
    traced = jax.make_jaxpr(lambda x: nnx.merge(graphdef, state).route(x))(x)
    (product,) = (line for line in str(traced).splitlines() if "f32[" in line and "dot_general" in line)
    assert f"f32[{B * N},4] = dot_general" in product
    assert "HIGHEST" in str(traced)
