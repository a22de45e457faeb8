"""Only attention grows faster than linearly with the tokens; checked on traced programs, which are not run."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import growth
from micro_dit.models import layers
from micro_dit.models.moe import ExpertChoiceFFN

WIDTH, TOKENS = 32, (256, 1024, 4096)
LINEAR = 1.001  # maximum exponent of linear growth; constant terms decrease the exponent
PARTS = growth.parts_of(WIDTH, "float32")


class OneHotExperts(ExpertChoiceFFN):
    """Experts with the public release's dispatch, by products with one-hot matrices."""

    def __call__(self, x: jax.Array) -> jax.Array:
        chosen, probabilities = self.route(x)
        one_hot = jax.nn.one_hot(chosen, x.shape[1])  # (B, E, T, N)
        taken = jnp.einsum("betn,bnd->betd", one_hot, x)
        hidden = jax.nn.gelu(jnp.einsum("betd,edf->betf", taken, self.w1[...]), approximate=False)
        out = jnp.einsum("betf,efd->betd", hidden, self.w2[...])
        return jnp.einsum("betn,bet,betd->bnd", one_hot, probabilities, out)


def make_experts(kind: type[ExpertChoiceFFN]) -> ExpertChoiceFFN:
    return kind(WIDTH, WIDTH, experts=4, capacity=2.0, out_std=0.02, dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(0))


def exponents(
    part: Callable[[int], tuple[Any, Sequence[Any]]], sizes: Sequence[int] = TOKENS
) -> tuple[list[float], list[float]]:
    """Returns growth exponents between neighboring sizes, of the products' FLOPs and of the largest array."""
    flops, largest = zip(*(growth.cost(*part(tokens)) for tokens in sizes), strict=True)
    return growth.exponents(sizes, flops), growth.exponents(sizes, largest)


def test_attention_grows_with_the_square_of_the_tokens() -> None:
    flops, largest = exponents(PARTS["attention"])
    assert flops == pytest.approx([2, 2])
    assert largest == pytest.approx([2, 2])


@pytest.mark.parametrize("name", [name for name in PARTS if name != "attention"])
def test_other_parts_grow_linearly_with_the_tokens(name: str) -> None:
    flops, largest = exponents(PARTS[name])
    assert all(slope <= LINEAR or math.isnan(slope) for slope in flops)  # masking has no products
    assert 0.9 < max(largest) <= LINEAR


def test_detects_the_quadratic_growth_of_one_hot_dispatch() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 16, WIDTH))
    ours, one_hot = make_experts(ExpertChoiceFFN), make_experts(OneHotExperts)
    assert jnp.allclose(ours(x), one_hot(x), atol=1e-6), "the same layer"

    def gradient(layer: ExpertChoiceFFN) -> Callable[[int], tuple[Any, Sequence[Any]]]:
        of_layer = jax.grad(lambda x: jnp.sum(layer(x) ** 2))
        return lambda tokens: (of_layer, [jax.ShapeDtypeStruct((2, tokens, WIDTH), jnp.float32)])

    flops, largest = exponents(gradient(ours))
    assert max(flops + largest) <= LINEAR
    flops, largest = exponents(gradient(one_hot))
    assert flops[-1] > 1.9
    assert largest == pytest.approx([2, 2])


@pytest.mark.parametrize("kept", [0.25, 1.0], ids=["masked", "unmasked"])
def test_training_step_without_attention_grows_linearly_with_the_tokens(
    monkeypatch: pytest.MonkeyPatch, kept: float
) -> None:
    def step(tokens: int) -> tuple[Any, Sequence[Any]]:
        return growth.step_of(growth.Setting(tokens, kept), WIDTH, "float32")

    (flops,), (largest,) = exponents(step, TOKENS[1:])
    assert flops > 1.3
    assert largest == pytest.approx(2)

    monkeypatch.setattr(layers, "attend", lambda q, k, v, heads: q + k.mean(1, keepdims=True) * v[:, :1])
    (flops,), (largest,) = exponents(step, TOKENS[1:])
    assert 0.8 < flops <= LINEAR
    assert 0.9 < largest <= LINEAR


def test_exponents_and_table() -> None:
    assert growth.exponents((1, 2, 8), (3, 12, 24)) == pytest.approx([2, 0.5])
    timed = [growth.Timed(lambda: None, flops, 0.0) for flops in (1e9, 4e9)]
    found = growth.curve("tokens", (256, 512), timed, (0.1, 0.3))
    assert found["flops_exponents"] == pytest.approx([2])
    first, second = growth.table([found]).splitlines()[1:]
    assert first.split() == ["tokens", "256", "100", "1", "–"]
    assert second.split() == ["512", "300", "1.58", "4", "2.00", "–"]


def test_plot(tmp_path: Path) -> None:
    def line(name: str) -> dict[str, Any]:
        timed = [growth.Timed(lambda: None, flops, 0.0) for flops in (1e9, 4e9)]
        return growth.curve(name, (256, 512), timed, (0.1, 0.3))

    growth.plot([line(name) for name in growth.VARIED], [line("attention")], tmp_path / "growth.png", "seconds")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
