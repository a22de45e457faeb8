"""The PyTorch twin computes the same results as micro_dit and as the public release."""

import importlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from micro_dit.diffusion import edm
from micro_dit.interop.torch_checkpoint import release_name, release_shapes, to_release_layout
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import bind
from micro_dit.models.masking import TokenMask, mask_from_noise
from micro_dit.training.optimizer import make_optimizer
from tests.helpers import tiny

torch = pytest.importorskip("torch", reason="requires torch; run `pip install torch`")
torch_twin = importlib.import_module("benchmarks.torch_twin")

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-5  # relative to the maximum; measured: loss 3e-7, forward 2e-6, gradients 4e-6, AdamW step 1e-7
IMAGES, CLIP, LEARNING_RATE = 3, 0.25, 1e-3
P_MEAN, P_STD = -0.6, 1.2


def assert_close(theirs: Any, ours: Any, what: str, tolerance: float = TOLERANCE) -> None:
    theirs, ours = np.asarray(theirs, np.float64), np.asarray(ours, np.float64)
    assert theirs.shape == ours.shape, what
    error, scale = np.abs(theirs - ours).max(), np.abs(ours).max()
    assert error <= tolerance * scale, f"{what}: {error / scale:.1e}"


def nchw(x: Any) -> Any:
    return torch.from_numpy(np.array(x).transpose(0, 3, 1, 2))


def nhwc(x: Any) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


def torch_mask(mask: TokenMask | None) -> Any:
    return mask and torch_twin.Mask(*(torch.from_numpy(np.array(a, np.int64)) for a in mask))


def in_release_layout(arrays: Any, config: DiTConfig) -> dict[str, np.ndarray]:
    return {release_name(name): to_release_layout(name, np.asarray(a), config) for name, a in arrays.items()}


def make_training(config: DiTConfig, params: Any, **options: Any) -> Any:
    twin = torch_twin.TorchTwin(config)
    torch_twin.load_params(twin, params)
    return torch_twin.Training(
        twin, learning_rate=LEARNING_RATE, clip=CLIP, P_mean=P_MEAN, P_std=P_STD, mask_ratio=0.75, **options
    )


class Both:
    """The tiny network and a step's random inputs for both frameworks; its mixer has a dense and an expert block."""

    def __init__(self, mask_ratio: float) -> None:
        self.config = tiny.network(use_bias=True, depth=1)
        self.params = tiny.random_params(self.config)
        self.x, _, self.y = tiny.inputs(self.config, IMAGES)
        generator = np.random.default_rng(1)
        self.sigma = np.exp(P_MEAN + P_STD * generator.standard_normal(IMAGES, np.float32))
        self.noise = generator.standard_normal(self.x.shape, np.float32)
        uniform = generator.random((IMAGES, self.config.tokens), np.float32)
        self.mask = mask_from_noise(uniform, int(self.config.tokens * (1 - mask_ratio))) if mask_ratio else None
        self.drawn = torch_twin.Drawn(
            nchw(self.x), torch.from_numpy(np.array(self.y)), torch.from_numpy(self.sigma), nchw(self.noise),
            torch_mask(self.mask),
        )  # fmt: skip

    def loss(self, params: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the mean loss, and the network's output."""
        returned = []

        def F(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
            returned.append(bind(self.config, params)(x, t, y, self.mask))
            return returned[-1]

        return edm.loss(F, self.x, self.y, self.sigma, self.noise, mask=self.mask).mean(), returned[0]

    def compare_loss(self, training: Any, loss: jax.Array, F_x: jax.Array) -> None:
        """Compares loss and output; the gradients remain in the twin's parameters."""
        returned = []
        hook = training.twin.register_forward_hook(lambda module, inputs, output: returned.append(output))
        assert_close(training.gradients(self.drawn), loss, "loss")
        assert_close(nhwc(returned[0]), F_x, "forward")
        hook.remove()


def test_unmasked_loss() -> None:
    both = Both(0.0)
    loss, F_x = jax.jit(both.loss)(both.params)
    both.compare_loss(make_training(both.config, both.params), loss, F_x)


def test_masked_training_step() -> None:
    both, optimizer = Both(0.75), make_optimizer(CLIP)

    @jax.jit
    def step(params: Any) -> tuple[Any, ...]:
        (loss, F_x), gradients = jax.value_and_grad(both.loss, has_aux=True)(params)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        after = jax.tree.map(lambda p, u: p - LEARNING_RATE * u, params, updates)
        return loss, F_x, gradients, optax.tree.norm(gradients), after

    loss, F_x, gradients, gradient_norm, after = step(both.params)
    training = make_training(both.config, both.params)
    both.compare_loss(training, loss, F_x)
    expected, named = in_release_layout(gradients, both.config), dict(training.twin.named_parameters())
    assert set(named) == set(expected)
    for name, parameter in named.items():
        assert_close(parameter.grad, expected[name], f"gradient of {name}")

    # Microbatches of one image give the same result as the whole batch.
    one_by_one = make_training(both.config, both.params, microbatch=1)
    assert_close(one_by_one.gradients(both.drawn), loss, "loss, image by image")
    for (name, parameter), other in zip(named.items(), one_by_one.twin.parameters(), strict=True):
        assert_close(other.grad, parameter.grad.numpy(), f"gradient of {name}, image by image")

    # One step of AdamW with clipping. Both use the same gradients, because AdamW's first step is equally large for
    # gradients that are only rounding errors.
    assert gradient_norm > 2 * CLIP
    after = in_release_layout(after, both.config)
    for name, parameter in named.items():
        parameter.grad = torch.from_numpy(np.array(expected[name], order="C"))  # required by the fused step
    training.update()
    for name, parameter in named.items():
        assert_close(parameter.detach().numpy(), after[name], f"{name} after a step")


def test_distributions_of_a_steps_random_inputs() -> None:
    both = Both(0.75)
    training = make_training(both.config, both.params, caption_drop=0.5)
    torch.manual_seed(0)
    x, y = both.drawn.x.repeat(400, 1, 1, 1), both.drawn.y.repeat(400, 1, 1)
    drawn = training.draw(x, y)
    logarithm = drawn.sigma.log()
    assert abs(logarithm.mean() - P_MEAN) < 0.15
    assert abs(logarithm.std() - P_STD) < 0.1
    assert abs(drawn.noise.std() - 1) < 0.01
    dropped = (drawn.y == 0).flatten(1).all(dim=1)
    assert 0.4 < dropped.float().mean() < 0.6
    assert torch.equal(drawn.y[~dropped], y[~dropped])
    N, K = both.config.tokens, both.config.tokens // 4
    assert drawn.mask.keep.shape == (len(x), K)
    assert torch.equal(drawn.mask.restore.gather(1, drawn.mask.keep), torch.arange(K).expand(len(x), K))
    assert torch.bincount(drawn.mask.keep.flatten(), minlength=N).min() > 0  # every position is kept in some image
    assert torch.isfinite(training.step(x[:2], y[:2]))


def test_twin_matches_the_release() -> None:
    about = json.loads((GOLDEN / "dit_a.json").read_text())
    with np.load(GOLDEN / "dit_a.npz") as arrays:
        golden = {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "fi"}
        arguments = json.loads(str(arrays["config_json"]))
    config = DiTConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()})
    twin = torch_twin.TorchTwin(config)
    assert {name: tuple(t.shape) for name, t in twin.state_dict().items()} == release_shapes(config)
    twin.load_state_dict({k.removeprefix("params/"): v for k, v in golden.items() if k.startswith("params/")})
    x, t, y = golden["in/x"], golden["in/t"], golden["in/y"].squeeze(1)
    with torch.no_grad():
        assert_close(twin(x, t, y), golden["fwd_m0/sample"], "forward")
        mask = torch_twin.Mask(golden["fwd_m75/ids_keep"].long(), golden["fwd_m75/ids_restore"].long())
        assert_close(twin(x, t, y, mask), golden["fwd_m75/sample"], "forward, masked")
        case = "edm_pm06_m75"
        mask = torch_twin.Mask(*(golden[f"{case}/{name}"].long() for name in ("ids_keep", "ids_restore")))
        drawn = torch_twin.Drawn(
            golden["edm_pm06/x"], golden["edm_pm06/y"].squeeze(1), golden[f"{case}/sigma"].flatten(),
            golden[f"{case}/noise"], mask,
        )  # fmt: skip
        assert_close(torch_twin.edm_loss(twin, drawn, 0.9), golden[f"{case}/loss"].reshape(()), "loss")
    sampled = [name for name, case in about["cases"].items() if name.startswith("samp") and case.get("cfg", 1) > 1]
    assert sampled
    name = min(sampled, key=lambda name: about["cases"][name]["steps"])
    case, noise, captions = about["cases"][name], golden["samp/x0"], golden["samp/y"].squeeze(1)
    latents = torch_twin.heun(twin, noise, captions, steps=case["steps"], guidance=case["cfg"])
    assert_close(latents, golden[f"{name}/latents"], name, tolerance=1e-4)
