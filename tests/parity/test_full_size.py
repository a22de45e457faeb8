"""Compares outputs at the published sizes with the public release, for weights from a fixed random recipe."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from micro_dit.diffusion import edm
from micro_dit.interop.torch_checkpoint import from_release_layout, release_name, release_shapes, to_release_layout
from micro_dit.models.config import make_config
from micro_dit.models.dit import abstract_params, bind
from tests.helpers.golden import assert_close, draw, draw_parameter, mask_of, nhwc, read, under

TOLERANCE = 1e-4


def test_full_size(full_file: Path) -> None:
    arrays, about = read(full_file)
    config, seed, recipe = make_config(about["arch"], **about["ctor"]), about["seed"], about["recipe"]
    shapes, params = release_shapes(config), {}
    for name in abstract_params(config):
        golden = release_name(name)
        value = draw_parameter(seed, golden, shapes[golden], recipe)
        check = about["param_checks_sum_sumsq_first_last"][golden]
        np.testing.assert_allclose([value.flat[0], value.flat[-1]], check[2:], rtol=1e-6, err_msg=golden)
        params[name] = jnp.asarray(from_release_layout(name, value))

    index = about["input_index"]
    x = nhwc(draw(seed, f"in/x/{index}", (about["N"], config.in_channels, config.input_size, config.input_size)))
    y = draw(seed, f"in/y/{index}", (about["N"], 1, about["caption_len"], config.caption_channels))[:, 0]

    forward = jax.jit(lambda params, x, t, y, mask: bind(config, params)(x, t, y, mask))
    # If there are golden gradients of the masked network, comparing its output adds nothing.
    masked = () if "edm_m75" in about else ("fwd_m75",)
    for case in (c for c in ("fwd_m0", *masked) if c in about):
        recorded = under(arrays, f"{case}/")
        ours = forward(params, x, arrays["in/t"], y, mask_of(recorded))
        assert_close(ours, nhwc(recorded["sample"]), TOLERANCE, case)

    if "edm_m75" not in about:
        return
    recorded = under(arrays, "edm_m75/")
    mask = mask_of(recorded)
    noise = nhwc(draw(seed, "edm/noise", (about["N"], config.in_channels, config.input_size, config.input_size)))
    sigma = np.exp(about["edm_m75"]["P_mean"] + about["edm_m75"]["P_std"] * recorded["rnd_normal"].reshape(-1))

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradients(params: Any) -> jax.Array:
        network = bind(config, params)
        return edm.loss(lambda x, t, y: network(x, t, y, mask), jnp.float32(0.9) * x, y, sigma, noise, mask=mask).mean()

    loss, gradients = loss_and_gradients(params)
    assert_close(loss, recorded["loss"], TOLERANCE, "loss")
    l2 = {str(n): v for n, v in zip(recorded["grad_names"], recorded["grad_l2"], strict=True)}
    projection = {str(n): v for n, v in zip(recorded["grad_names"], recorded["grad_proj"], strict=True)}
    assert len(l2) == len(gradients)
    for name, gradient in gradients.items():
        golden = release_name(name)
        g = to_release_layout(name, np.asarray(gradient, np.float64), config)
        assert abs(np.linalg.norm(g) - l2[golden]) <= TOLERANCE * l2[golden], f"gradient norm of {golden}"
        direction = draw(seed, f"proj/{golden}", shapes[golden])
        error = abs((g * direction).sum() - projection[golden])
        assert error <= 10 * TOLERANCE * l2[golden], f"gradient of {golden} along a random direction"
