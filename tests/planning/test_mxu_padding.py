"""The estimated padding in a TPU's matrix units, for given matrix products and for traced programs."""

import jax
import jax.numpy as jnp
import pytest

from micro_dit.models.config import make_config
from micro_dit.models.dit import abstract_params, bind
from micro_dit.models.flops import forward_flops
from micro_dit.planning.aot import TPUS
from micro_dit.planning.mxu_padding import MATRIX_UNITS, MatrixProduct, matrix_products, padding
from tests.helpers import tiny


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)


@pytest.mark.parametrize(
    ("product", "chip", "times"),
    [
        (MatrixProduct(1, 256, 1024, 512), "v5e", 1),
        (MatrixProduct(1, 4096, 960, 1024), "v5e", 1024 / 960),
        (MatrixProduct(1, 4096, 1024, 960), "v5e", 1),  # the 960 columns are streamed
        (MatrixProduct(1, 4096, 640, 1024), "v6e", 768 / 640),
        (MatrixProduct(64, 1024, 64, 1024), "v5e", 2),  # attention scores with head_dim 64
        (MatrixProduct(64, 1024, 64, 1024), "v6e", 4),
        (MatrixProduct(64, 1024, 1024, 64), "v5e", 2),  # attention output; loading the next tile costs as much
        (MatrixProduct(64, 1024, 1024, 64), "v6e", 4),
        (MatrixProduct(1, 4096, 1024, 8), "v5e", 9),
        (MatrixProduct(1, 1024, 4, 6144), "v5e", 32),  # gradient of a modulation kernel from four images
    ],
)
def test_padded_flops_of_a_product(product: MatrixProduct, chip: str, times: float) -> None:
    assert product.padded_flops(MATRIX_UNITS[chip]) == pytest.approx(times * product.flops)


def test_the_matrix_products_of_a_network_match_the_flops_formula() -> None:
    config = tiny.network()
    images = 3
    traced = jax.make_jaxpr(lambda params, *inputs: bind(config, params)(*inputs))(
        abstract_params(config), *tiny.inputs(config, images)
    )
    expected = images * sum(forward_flops(config, caption_tokens=tiny.TEXT.tokens).values())
    assert sum(product.flops for product in matrix_products(traced)) == expected


def test_products_in_loops_and_nested_programs_are_counted() -> None:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jax.jit(jax.checkpoint(lambda x: x @ w))(x), None

    traced = jax.make_jaxpr(lambda x, w: jax.lax.scan(layer, x, w))(shape(4, 8, 16), shape(5, 16, 16))
    assert matrix_products(traced) == [MatrixProduct(1, 32, 16, 16, times=5)]


def test_batched_products_are_recognized() -> None:
    traced = jax.make_jaxpr(lambda q, k: jnp.einsum("bthd,bshd->bhts", q, k))(shape(2, 7, 3, 64), shape(2, 5, 3, 64))
    (product,) = matrix_products(traced)
    assert (product.batch, product.contracted) == (6, 64)
    assert {product.rows, product.columns} == {5, 7}


def test_the_share_of_padding_of_a_program() -> None:
    traced = jax.make_jaxpr(lambda x, w: x @ w)(shape(256, 64), shape(64, 256))
    assert padding(traced, "v5e") == pytest.approx(1 / 2)
    assert padding(traced, "v6e") == pytest.approx(3 / 4)
    assert padding(traced, "h100") is None
    assert padding(jax.make_jaxpr(lambda x: x + 1)(shape(4)), "v5e") == 0


def test_every_tpu_topology_has_a_matrix_unit() -> None:
    assert set(TPUS) <= set(MATRIX_UNITS)


def test_widths_of_xl_are_multiples_of_the_tile_size() -> None:
    config = make_config("MicroDiT_XL_2", input_size=32)
    blocks = (*config.mixer_blocks(), *config.backbone_blocks())
    assert not [block for block in blocks if block.dim % 128 or block.attention_width % 128 or block.hidden_width % 256]
