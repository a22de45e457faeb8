"""Products in 8 bits: the rounding beside NumPy's, which products of the network are rounded, and that it learns."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from micro_dit.diffusion import edm
from micro_dit.errors import UserError
from micro_dit.models import quantization
from micro_dit.models.config import REMAT
from micro_dit.models.dit import abstract_params, bind
from micro_dit.models.quantization import FORMATS, check_format, quantized
from tests.helpers import tiny

CONFIG = tiny.network()
X, T, Y = tiny.inputs(CONFIG)
TYPES = {"int8": (np.int8, np.int8), "fp8": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)}


def rounded(x: np.ndarray, axis: int, to: Any) -> np.ndarray:
    """x as numbers of another type, the largest along `axis` scaled to the end of its range."""
    end = 127.5 if to == np.int8 else float(ml_dtypes.finfo(to).max)
    scale = np.abs(x).max(axis=axis, keepdims=True) / np.float32(end)
    whole = np.clip(np.round(x / scale), -128, 127) if to == np.int8 else (x / scale).astype(to)
    return whole.astype(np.float32) * scale


def factors(*batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, kernel and the output's gradient; the rows of x are of very different size.

    Their largest numbers are positive: -127.5, in int8, may become -127 or -128, by how it was rounded before.
    """
    generator = np.random.default_rng(0)
    shapes = ((*batch, 6, 20), (*batch, 20, 10), (*batch, 6, 10))
    x, kernel, d_out = (generator.uniform(-0.4, 1, shape).astype(np.float32) for shape in shapes)
    return x * np.float32(10) ** np.arange(-3, 3, dtype=np.float32)[:, None], kernel, d_out


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("name", FORMATS)
def test_two_products_are_rounded_and_the_third_is_not(name: str, batch: tuple[int, ...]) -> None:
    x, kernel, d_out = factors(*batch)
    values, gradients = TYPES[name]
    out, vjp = jax.vjp(quantized(name), jnp.asarray(x), jnp.asarray(kernel))
    d_x, d_kernel = vjp(jnp.asarray(d_out))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    unit = np.abs(x).max(axis=-1, keepdims=True)  # each row has its own scale, so each is exact
    close(out / unit, rounded(x, -1, values) @ rounded(kernel, -2, values) / unit)
    close(d_x, rounded(d_out, -1, gradients) @ rounded(kernel.swapaxes(-1, -2), -2, values))
    close(d_kernel, x.swapaxes(-1, -2) @ d_out)
    assert np.abs(out / unit - x @ kernel / unit).max() > 1e-2, "nothing was rounded"


@pytest.mark.parametrize("name", FORMATS)
def test_an_accelerators_program_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel, d_out = (jnp.asarray(factor, jnp.bfloat16) for factor in factors(2))

    def run() -> list[np.ndarray]:
        out, vjp = jax.vjp(quantized(name), x, kernel)
        assert out.dtype == jnp.bfloat16
        return [np.asarray(a, np.float32) for a in (out, *vjp(d_out))]

    on_a_cpu = run()
    monkeypatch.setattr(quantization.jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    for here, there in zip(on_a_cpu, run(), strict=True):
        unit = np.abs(here).max(axis=-1, keepdims=True)
        np.testing.assert_allclose(there / unit, here / unit, atol=1e-2)  # bfloat16


def test_rows_of_zeros_stay_zeros() -> None:
    out, vjp = jax.vjp(quantized("int8"), jnp.zeros((3, 8)), jnp.zeros((8, 4)))
    for array in (out, *vjp(jnp.zeros((3, 4)))):
        np.testing.assert_array_equal(array, np.zeros(array.shape))


def loss(params: Any, quantize: str, remat: str = "none") -> jax.Array:
    return edm.loss(bind(CONFIG, params, remat=remat, quantize=quantize), X, Y, jnp.exp(T), X[::-1]).mean()


@pytest.mark.parametrize("remat", REMAT)
def test_the_blocks_products_with_weights_are_in_8_bits_once_each(remat: str) -> None:
    """In the program for a TPU; in the backward pass those of the outputs are computed again only if all is."""
    lowered = jax.jit(jax.grad(loss), static_argnums=(1, 2)).trace(abstract_params(CONFIG), "int8", remat)
    text = lowered.lower(lowering_platforms=("tpu",)).as_text()
    found = re.findall(r"dot_general.*xi8>, tensor<.*xi8>\)", text)
    # qkv, q, kv and two proj; w1 and w2 of experts, and w3 of a dense feed-forward.
    blocks = [*CONFIG.mixer_blocks(), *CONFIG.backbone_blocks()]
    layers = sum(5 + (2 if block.moe else 3) for block in blocks)
    assert len({block.moe for block in blocks}) == 2
    assert len(found) == (3 if remat == "full" else 2) * layers


@pytest.mark.parametrize("name", FORMATS)
def test_the_networks_gradients_are_nearly_those_without_it(name: str) -> None:
    params = tiny.random_params(CONFIG)
    exact, expected = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, "")
    value, got = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, name)
    assert value != exact
    np.testing.assert_allclose(value, exact, rtol=0.05)
    a, b = (np.concatenate([np.ravel(g) for g in gradients.values()]) for gradients in (expected, got))
    assert np.linalg.norm(a - b) < {"int8": 0.1, "fp8": 0.3}[name] * np.linalg.norm(a)
    assert all(np.any(gradient) for gradient in got.values())


def test_an_unknown_format_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_format("")
    check_format("int8")
    with pytest.raises(UserError, match="quantize 'int4' is unknown; use one of int8, fp8, or ''"):
        check_format("int4")
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    check_format("")
    with pytest.raises(UserError, match=r"needs Qwix: pip install 'micro_dit\[quantize\]'"):
        check_format("fp8")
