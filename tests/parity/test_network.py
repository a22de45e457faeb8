"""Compares the network, its preconditioning, loss, gradients and sampler with golden tensors of the public release."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.diffusion import edm
from micro_dit.diffusion.guidance import extrapolate, guide
from micro_dit.diffusion.samplers import noise_levels, sample
from micro_dit.interop.torch_checkpoint import from_state_dict, release_name, to_release_layout, to_state_dict
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import bind
from micro_dit.models.masking import kept_tokens, mask_from_noise
from tests.helpers.golden import assert_close, caption, config_of, mask_of, nhwc, read, under

TOLERANCE = 1e-4
SAMPLER_TOLERANCE = 1e-3


class Network:
    """The network of a golden file, with compiled functions for the checks."""

    def __init__(self, path: Path) -> None:
        self.arrays, self.about = read(path)
        self.config: DiTConfig = config_of(json.loads(str(self.arrays["config_json"])))
        self.state_dict = under(self.arrays, "params/")
        self.params = from_state_dict(self.state_dict, self.config)
        # Parameters are arguments. If they were closed over, XLA would fold them as constants, which takes minutes.
        self.forward = jax.jit(self._forward)
        self.denoise = jax.jit(self._denoise, static_argnames="scale")
        self.loss_and_gradients = jax.jit(jax.value_and_grad(self._loss))

    def F(self, params: Any, mask: Any, scale: float) -> edm.Network:
        network = bind(self.config, params)
        return guide(lambda x, t, y: network(x, t, y, mask), scale)

    def _forward(self, params: Any, x: Any, t: Any, y: Any, mask: Any = None, scale: Any = None) -> jax.Array:
        """Applies guidance unless `scale` is None; the scale is traced, so one program serves all scales."""
        F = self.F(params, mask, 1.0)
        return (F if scale is None else extrapolate(F, scale))(x, t, y)

    def _denoise(self, params: Any, x: Any, sigma: Any, y: Any, mask: Any = None, scale: float = 1.0) -> jax.Array:
        return edm.denoise(self.F(params, mask, scale), x, sigma, y)

    def _loss(self, params: Any, x: Any, y: Any, sigma: Any, noise: Any, mask: Any) -> jax.Array:
        F = self.F(params, mask, 1.0)
        return edm.loss(F, x, y, sigma, noise, mask=mask, patch_size=self.config.patch_size).mean()


@functools.cache
def load(path: Path) -> Network:
    return Network(path)


def check_forward(net: Network, name: str, case: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    x, y = nhwc(net.arrays["in/x"]), caption(net.arrays["in/y"])
    t = np.broadcast_to(case.get("t", net.arrays["in/t"]), len(x))  # a scalar level applies to all images
    if "ynull" in name:
        y = np.zeros_like(y)
    mask = mask_of(case)
    if mask is None:
        assert_close(net.forward(net.params, x, t, y, None), nhwc(case["sample"]), TOLERANCE, name)
        return
    assert kept_tokens(net.config.tokens, about["mask_ratio"]) == mask.keep.shape[1]
    ours = mask_from_noise(case["rand"], mask.keep.shape[1])
    np.testing.assert_array_equal(ours.keep, mask.keep)
    np.testing.assert_array_equal(ours.restore, mask.restore)
    np.testing.assert_array_equal(ours.dropped, case["mask"])
    assert_close(net.forward(net.params, x, t, y, mask), nhwc(case["sample"]), TOLERANCE, name)


def check_guidance(net: Network, name: str, case: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    x, y = nhwc(net.arrays["in/x"]), caption(net.arrays["in/y"])
    t = np.broadcast_to(case.get("t", net.arrays["in/t"]), len(x))
    assert_close(net.forward(net.params, x, t, y, None, about["cfg"]), nhwc(case["sample"]), TOLERANCE, name)


def check_preconditioning(net: Network, name: str, case: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    inputs = under(net.arrays, "wrap/")
    x, sigma, y = nhwc(inputs["x"]), inputs["sigma"], caption(inputs["y"])
    _, _, c_in, c_noise = edm.precondition(jnp.asarray(sigma))
    assert_close(c_noise, inputs["c_noise"], TOLERANCE, "c_noise")
    assert_close(c_in[:, None, None, None] * x, nhwc(inputs["c_in_x"]), TOLERANCE, "c_in·x")
    mask, scale = mask_of(case), about["cfg"]
    guided = () if scale == 1 else (scale,)
    F_x = net.forward(net.params, c_in[:, None, None, None] * x, c_noise, y, mask, *guided)
    D_x = net.denoise(net.params, x, sigma, y, mask, scale=scale)
    assert_close(F_x, nhwc(case["F_x"]), TOLERANCE, f"{name} F_x")
    assert_close(D_x, nhwc(case["D_x"]), TOLERANCE, f"{name} D_x")


def check_loss(net: Network, name: str, case: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    shared = under(net.arrays, name.rsplit("_", 1)[0] + "/")
    x, y, noise = nhwc(shared["x"]), caption(shared["y"]), nhwc(case["noise"])
    sigma, mask = case["sigma"].reshape(-1), mask_of(case)
    assert_close(np.exp(about["P_mean"] + about["P_std"] * case["rnd_normal"].reshape(-1)), sigma, TOLERANCE, "sigma")
    D_xn = net.denoise(net.params, x + sigma[:, None, None, None] * noise, sigma, y, mask)
    assert_close(D_xn, nhwc(case["D_xn"]), TOLERANCE, f"{name} D_xn")

    loss, gradients = net.loss_and_gradients(net.params, x, y, sigma, noise, mask)
    assert_close(loss, case["loss"], TOLERANCE, f"{name} loss")
    gradients = {
        release_name(k): to_release_layout(k, np.asarray(v, np.float64), net.config) for k, v in gradients.items()
    }
    names = [str(n) for n in net.arrays["gradsum/names"]]
    assert sorted(names) == sorted(gradients)
    sums = under(net.arrays, f"gradsum/{name}/")
    for i, parameter in enumerate(names):
        g, l2 = gradients[parameter], sums["l2"][i]
        assert abs(np.linalg.norm(g) - l2) <= TOLERANCE * l2 + 1e-9, f"{name} gradient norm of {parameter}"
        # Signed entries cancel in a sum, so the tolerance is relative to the norm of the entries.
        slack = TOLERANCE * l2 * np.sqrt(g.size) + 1e-9
        assert abs(g.sum() - sums["sum"][i]) <= slack, f"{name} gradient sum of {parameter}"
        assert abs(np.abs(g).max() - sums["absmax"][i]) <= TOLERANCE * sums["absmax"][i] + 1e-9, parameter


def check_sampler(net: Network, name: str, case: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    inputs = under(net.arrays, "samp/")
    noise, y, steps, scale = nhwc(inputs["x0"]), caption(inputs["y"]), about["steps"], about["cfg"]
    levels = noise_levels(steps)
    np.testing.assert_allclose(levels, inputs[f"t_steps_{steps}"], rtol=1e-6)
    called = np.sort(np.concatenate([levels[:-1], levels[1:-1]]))[::-1]
    assert_close(called, case["sigma_calls"], 1e-6, f"{name} levels called")
    D_x = []

    def D(x: jax.Array, sigma: float) -> jax.Array:
        D_x.append(net.denoise(net.params, x, np.float32([sigma]), y, scale=scale))
        return D_x[-1]

    assert_close(sample(D, noise, levels), nhwc(case["latents"]), SAMPLER_TOLERANCE, f"{name} latents")
    assert_close(D_x[0], nhwc(case["first_D_x"]), SAMPLER_TOLERANCE, f"{name} first call")
    assert_close(D_x[1], nhwc(case["second_D_x"]), SAMPLER_TOLERANCE, f"{name} second call")


CHECKS = {
    "fwd": check_forward,
    "cfg": check_guidance,
    "wrap": check_preconditioning,
    "edm": check_loss,
    "samp": check_sampler,
}


def test_case(network_case: tuple[Path, str]) -> None:
    path, name = network_case
    net = load(path)
    kind = next((kind for kind in CHECKS if name.startswith(kind)), None)
    assert kind, f"{path.name} contains a case of an unknown kind: {name}"
    about = {"cfg": 1.0} | net.about["cases"][name]
    CHECKS[kind](net, name, under(net.arrays, f"{name}/"), about)


def test_state_dict_round_trips(network_file: Path) -> None:
    net = load(network_file)
    back = to_state_dict(net.params, net.config)
    assert set(back) == set(net.state_dict)
    for name, value in net.state_dict.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_activations(network_file: Path) -> None:
    net = load(network_file)
    golden = under(net.arrays, "acts/")
    if not golden:
        pytest.skip("this golden file has no activations")
    x, t, y = nhwc(net.arrays["in/x"]), net.arrays["in/t"], caption(net.arrays["in/y"])

    @jax.jit
    def activations(params: Any) -> dict[str, jax.Array]:
        model, acts = bind(net.config, params), {}
        acts["t_embedder"] = model.noise_embedding(t)
        acts["y_embedder"] = model.caption_projection(y)
        acts["y_emb_preprocess"] = model.caption_block(acts["y_embedder"])
        acts["pooled_y_emb_process"] = model.pooled_caption(acts["y_emb_preprocess"].mean(axis=1))
        acts["x_embedder"] = model.patch_embedding(x)
        return acts

    for name, value in activations(net.params).items():
        assert_close(value, caption(golden[name]), TOLERANCE, name)


@pytest.mark.parametrize(("folder", "case"), [("grads", "edm_pm06_m75"), ("grads_p0", "edm_p0_m75")])
def test_every_gradient(network_file: Path, folder: str, case: str) -> None:
    path = network_file.with_name(f"{network_file.stem}_grads.npz")
    stored = np.load(path).files if path.exists() else []
    present = [f for f in (folder, f"{folder}_sub5", folder.replace("grads", "grads_sub5")) if any(
        name.startswith(f + "/") for name in stored)]  # fmt: skip
    if not present:
        pytest.skip(f"no {folder} for this golden file")
    net = load(network_file)
    shared, recorded = under(net.arrays, case.rsplit("_", 1)[0] + "/"), under(net.arrays, f"{case}/")
    _, gradients = net.loss_and_gradients(
        net.params, nhwc(shared["x"]), caption(shared["y"]), recorded["sigma"].reshape(-1), nhwc(recorded["noise"]),
        mask_of(recorded),
    )  # fmt: skip
    ours = {release_name(k): to_release_layout(k, np.asarray(v), net.config) for k, v in gradients.items()}
    with np.load(path) as golden:
        for which in present:
            every = 5 if "sub5" in which else 1
            for name, value in ours.items():
                expected = golden[f"{which}/{name}"]
                value = value if every == 1 else value.reshape(-1)[::every]
                assert_close(value, expected, TOLERANCE, f"{case} gradient of {name}")
