"""MaskDiT's decoder: influence of dropped tokens, its loss, initialization and FLOPs, and networks without it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.diffusion import edm, maskdit
from micro_dit.errors import UserError
from micro_dit.interop.model_folder import config_from
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import abstract_params, bind, init_params
from micro_dit.models.flops import forward_flops
from micro_dit.models.masking import TokenMask, mask_from_noise, restore_tokens
from micro_dit.parallel.mesh import make_mesh
from micro_dit.parallel.sharding import param_shardings
from tests.helpers import tiny

CONFIG = tiny.network(use_patch_mixer=False, decoder_depth=2, decoder_dim=16)
X, T, Y = tiny.inputs(CONFIG)
NOISE = jax.random.uniform(jax.random.key(0), (3, CONFIG.tokens))
MASK = mask_from_noise(NOISE, 4)


@jax.jit
def forward(params: Any, x: Any, mask: TokenMask | None) -> jax.Array:
    return bind(CONFIG, params)(x, T, Y, mask)


@jax.jit
def gradients(params: Any) -> Any:
    def loss(params: Any) -> jax.Array:
        model = bind(CONFIG, params)
        F = lambda x, t, y: model(x, t, y, MASK)  # noqa: E731
        return maskdit.loss(F, X, Y, jnp.exp(T), X[::-1], mask=MASK).mean()

    return jax.grad(loss)(params)


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    return tiny.random_params(CONFIG)


def test_restores_every_token_to_its_position(params: dict[str, jax.Array]) -> None:
    """Checks that a mask that keeps all tokens, in random order, does not change the output."""
    everything = mask_from_noise(NOISE, CONFIG.tokens)
    np.testing.assert_allclose(forward(params, X, everything), forward(params, X, None), atol=2e-5)
    assert float(jnp.std(forward(params, X, None))) > 0.1


def test_dropped_tokens_are_replaced_by_the_mask_token(params: dict[str, jax.Array]) -> None:
    filled = restore_tokens(jnp.zeros((3, 4, 5)), MASK, fill=jnp.arange(5.0))
    np.testing.assert_array_equal(filled, MASK.dropped[:, :, None] * jnp.arange(5.0))
    # All patches have an output, and the content of dropped patches does not influence it.
    out = forward(params, X, MASK)
    assert np.all(np.abs(np.asarray(out)).reshape(3, -1).min(axis=1) > 0)
    dropped = jnp.repeat(jnp.repeat(MASK.dropped.reshape(3, 4, 4), 2, 1), 2, 2)[..., None]
    np.testing.assert_array_equal(forward(params, X + 3 * dropped, MASK), out)
    other = params | {"decoder.mask_token": -2 * params["decoder.mask_token"]}
    assert not np.allclose(forward(other, X, MASK), out, atol=1e-3)
    np.testing.assert_array_equal(forward(other, X, None), forward(params, X, None))


def test_every_parameter_has_a_gradient(params: dict[str, jax.Array]) -> None:
    assert [name for name, gradient in gradients(params).items() if not np.any(gradient)] == []


def test_reconstruction_loss_has_weight_one_tenth_and_requires_a_mask() -> None:
    F: edm.Network = lambda x, t, y: jnp.tanh(x) + t[:, None, None, None]  # noqa: E731
    sigma = jnp.exp(T)
    noisy = X + sigma[:, None, None, None] * X[::-1]
    expected = 0.1 * reconstruction_by_hand(edm.denoise(F, noisy, sigma, Y), noisy)
    plain, with_it = (loss(F, X, Y, sigma, X[::-1], mask=MASK) for loss in (edm.loss, maskdit.loss))
    np.testing.assert_allclose(with_it - plain, expected, rtol=1e-4)
    plain, with_it = (loss(F, X, Y, sigma, X[::-1]) for loss in (edm.loss, maskdit.loss))
    np.testing.assert_array_equal(with_it, plain)


def reconstruction_by_hand(D_x: jax.Array, noisy: jax.Array) -> np.ndarray:
    """Computes MaskDiT's reconstruction loss patch by patch in float64."""
    losses = []
    for image in range(3):
        patches = []
        for token in np.flatnonzero(np.asarray(MASK.dropped[image])):
            row, column = 2 * (token // 4), 2 * (token % 4)
            got, target = (
                np.asarray(a, np.float64)[image, row : row + 2, column : column + 2].ravel() for a in (D_x, noisy)
            )
            variance = np.sum((target - target.mean()) ** 2) / (len(target) - 1)
            patches.append(np.mean((got - (target - target.mean()) / np.sqrt(variance + 1e-6)) ** 2))
        losses.append(np.mean(patches))
    return np.asarray(losses)


def test_initialized_network_outputs_zero() -> None:
    params = jax.jit(functools.partial(init_params, CONFIG))(jax.random.key(0))
    assert {name: leaf.shape for name, leaf in params.items()} == {
        name: leaf.shape for name, leaf in abstract_params(CONFIG).items()
    }
    for name in ("decoder.proj_in.linear.kernel", "decoder.proj_in.adaln.kernel", "decoder.blocks.1.adaln.kernel"):
        assert not np.any(params[name]), name
    assert 0 < float(jnp.abs(params["decoder.mask_token"]).max()) < 0.1
    np.testing.assert_array_equal(forward(params, X, MASK), 0)


@pytest.mark.parametrize("masked", [True, False])
def test_flops_equal_the_traced_matrix_products(masked: bool) -> None:
    assert_flops_equal_the_traced_matrix_products(CONFIG, masked)


def assert_flops_equal_the_traced_matrix_products(config: DiTConfig, masked: bool) -> None:
    mask = TokenMask(MASK.keep[:1], MASK.restore[:1]) if masked else None
    x, t, y = tiny.inputs(config, images=1)
    jaxpr = jax.make_jaxpr(lambda params: bind(config, params)(x, t, y, mask))
    counted = sum(product_flops(jaxpr(abstract_params(config)).jaxpr))
    assert counted == sum(forward_flops(config, 0.75 if masked else 0.0, tiny.TEXT.tokens).values())


def product_flops(jaxpr: Any) -> list[int]:
    """Returns the FLOPs, 2 × MACs, of each matrix product in a program."""
    flops = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            flops.append(2 * equation.outvars[0].aval.size * int(np.prod([shape[i] for i in contracted])))
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                flops += product_flops(getattr(inner, "jaxpr", inner))
    return flops


def test_all_parameters_have_a_sharding() -> None:
    assert set(param_shardings(make_mesh(None), abstract_params(CONFIG))) == set(abstract_params(CONFIG))


def test_reads_configs_saved_without_decoder_fields() -> None:
    fields = dataclasses.asdict(tiny.network())
    older = {name: value for name, value in fields.items() if not name.startswith("decoder")}
    assert config_from(older, "here") == tiny.network()
    assert not any("decoder" in name for name in abstract_params(tiny.network()))


def test_rejects_incomplete_decoder_settings() -> None:
    for fields in (dict(decoder_depth=2), dict(decoder_dim=16), dict(decoder_depth=-1, decoder_dim=16)):
        with pytest.raises(UserError, match="Set both, or neither"):
            tiny.network(**fields)
    with pytest.raises(UserError, match="decoder_dim 24 must be a multiple of head_dim 16"):
        tiny.network(decoder_depth=1, decoder_dim=24)
