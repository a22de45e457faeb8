"""Products of 8-bit numbers, by Qwix: an option for chips that multiply those faster than bfloat16.

Both factors are scaled to the format's range, each row of the first and each column of the second by its largest
absolute value, and rounded; sums are wide, and the result is scaled back. So are two of a layer's three products made,
the output and the gradient of the input. The gradient of the weight, which suffers most from rounding (Wortsman et al.
2023, arXiv 2304.13013), stays as it is: its scales would be those of all tokens, on all devices. So do
parameters and all that lies between the products.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from micro_dit.errors import UserError
from micro_dit.models.layers import Product

# The type of activations and weights, and that of gradients, which need range more than digits (Micikevicius et al.
# 2022, arXiv 2209.05433).
FORMATS = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}


def check_format(name: str) -> None:
    """Raises UserError for an unknown format, or if Qwix is missing; '' is no format, and needs nothing."""
    if name not in ("", *FORMATS):
        raise UserError(f"quantize {name!r} is unknown; use one of {', '.join(FORMATS)}, or '' for products in dtype.")
    if name and importlib.util.find_spec("qwix") is None:
        raise UserError(f"quantize {name!r} needs Qwix: pip install 'micro_dit[quantize]'.")


def quantized(name: str) -> Product:
    """A product for `micro_dit.models.layers` in a format of FORMATS: (…, rows, d) times (…, d, out), of x's dtype."""
    values, gradients = FORMATS[name]

    @jax.custom_vjp
    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _multiply(x, kernel, values, values)

    def forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return _multiply(x, kernel, values, values), (x, kernel)

    def backward(saved: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, kernel = saved
        return _multiply(d_out, kernel.mT, gradients, values), jnp.matmul(x.mT, d_out)

    product.defvjp(forward, backward)
    return product


def _multiply(a: jax.Array, b: jax.Array, a_type: jax.typing.DTypeLike, b_type: jax.typing.DTypeLike) -> jax.Array:
    """(…, n, k) times (…, k, m), of a's dtype."""
    import qwix

    batch = tuple(range(a.ndim - 2))
    # In float32, or the scales would be rounded to bfloat16.
    a_scaled = qwix.quantize(a.astype(jnp.float32), a_type, channelwise_axes=(*batch, a.ndim - 2))
    b_scaled = qwix.quantize(b.astype(jnp.float32), b_type, channelwise_axes=(*batch, b.ndim - 1))
    dimensions = (((a.ndim - 1,), (b.ndim - 2,)), (batch, batch))
    return jax.lax.platform_dependent(
        a_scaled, b_scaled,
        # A CPU is slow with 8 bits: the same rounded numbers as float32.
        cpu=lambda a, b: jnp.matmul(qwix.dequantize(a), qwix.dequantize(b)),
        default=functools.partial(qwix.dot_general, dimension_numbers=dimensions),
    ).astype(a.dtype)  # fmt: skip
