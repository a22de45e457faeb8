"""micro_dit as a contender: training steps, sampling and single layers. See benchmarks/contenders.py."""

import abc
import functools
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.contenders import GUIDANCE, NARROW_EXPERTS, Setting, cpu_seconds
from micro_dit.diffusion import edm
from micro_dit.diffusion.guidance import guide
from micro_dit.diffusion.samplers import noise_levels, sample
from micro_dit.errors import UserError
from micro_dit.models.dit import abstract_params, bind
from micro_dit.models.masking import drop_tokens, random_mask, restore_tokens
from micro_dit.models.moe import ExpertChoiceFFN
from micro_dit.parallel.cpu import compiler_options, keep_memory, register_lowerings
from micro_dit.training.phases import Phase
from micro_dit.training.recipe import Recipe
from micro_dit.training.state import abstract_state
from micro_dit.training.step import make_train_step


class Device:
    """The device of the programs, and the shapes of their inputs."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.network = setting, setting.network()
        try:
            self.device = jax.devices()[0]
        except RuntimeError as error:  # for example an incomplete driver
            raise UserError(f"JAX cannot use the GPU: {error}") from None
        if setting.gpu and self.device.platform != "gpu":
            raise UserError(f"JAX found no GPU, only {self.device.device_kind}. See requirements.txt.")
        B, side, L = setting.batch_size, self.network.input_size, setting.caption_tokens
        self.latents = (B, side, side, self.network.in_channels)
        self.captions = (B, L, self.network.caption_channels)

    def hello(self) -> dict[str, Any]:
        """Returns the name of the device."""
        return {"device": self.device.device_kind}


class Job(Device, abc.ABC):
    """A program that is compiled once and then run repeatedly."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.program: Any = None
        self.arguments: Any = None

    def prepare(self) -> dict[str, Any]:
        """Compiles the program, and on a GPU a second time from the persistent cache; allocates no arguments yet."""
        answer = self.hello() | self.compile()
        memory = self.program.memory_analysis()
        answer["needed_gb"] = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9
        if self.setting.gpu:
            jax.clear_caches()
            answer["warm_compile_s"] = self.compile()["compile_s"]
        return answer

    def compile(self) -> dict[str, float]:
        started, cpu = time.monotonic(), cpu_seconds()
        self.program = self.lower().compile()
        return {"compile_s": time.monotonic() - started, "compile_cpu_s": cpu_seconds() - cpu}

    def run(self, times: int) -> dict[str, Any]:
        """Returns seconds per run, averaged over `times` runs, and peak memory so far; the first call also warms up."""
        if self.arguments is None:
            self.arguments = self.make_arguments()
            jax.block_until_ready(self.once())
        started, cpu = time.monotonic(), cpu_seconds()
        for _ in range(times):
            out = self.once()
        jax.block_until_ready(out)
        wall, cpu = time.monotonic() - started, cpu_seconds() - cpu
        return {"wall_s": wall / times, "cpu_s": cpu / times, "peak_gb": peak_bytes(self.device) / 1e9}

    @abc.abstractmethod
    def lower(self) -> Any:
        """Returns the lowered program."""

    @abc.abstractmethod
    def make_arguments(self) -> Any:
        """Returns the program's arguments, on the device."""

    def once(self) -> Any:
        return self.program(*self.arguments)


class Training(Job):
    """The training step of micro_dit/training/step.py without EMA, with the largest microbatch that fits."""

    def __init__(self, setting: Setting) -> None:
        keep_memory()  # as in training
        register_lowerings()
        super().__init__(setting)
        self.microbatch = setting.microbatch or setting.batch_size
        resolution = 8 * self.network.input_size
        self.phase = Phase("benchmark", resolution, 1000, setting.batch_size, 2.4e-4, mask_ratio=setting.mask_ratio)

    @property
    def recipe(self) -> Recipe:
        setting = self.setting
        return Recipe(0.9, 0.1, dtype=setting.dtype, remat=setting.remat, adam={}, microbatch=self.microbatch)

    def prepare(self) -> dict[str, Any]:
        answer = super().prepare()
        limit = (self.device.memory_stats() or {}).get("bytes_limit", float("inf")) / 1e9
        while answer["needed_gb"] > limit:
            if self.microbatch == 1:
                raise UserError(
                    f"With a microbatch of 1, a step needs {answer['needed_gb']:.0f} GB; the device has {limit:.0f} GB."
                )
            self.microbatch //= 2
            answer = super().prepare()
        return answer | {"microbatch": self.microbatch}

    def lower(self) -> Any:
        step = make_train_step(self.network, self.phase, 0, self.recipe)
        shapes = {"latent_mean": self.latents, "caption": self.captions}
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.float16) for name, shape in shapes.items()}
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.jit(step, donate_argnums=0, compiler_options=compiler_options()).lower(self.state(), batch, key)

    def state(self) -> Any:
        return abstract_state(self.recipe.trainable(self.network), self.recipe.optimizer(self.phase), with_ema=False)

    def make_arguments(self) -> Any:
        state = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype)), self.state())
        state = state._replace(params=random_params(self.network))
        batch = {"latent_mean": random_array(self.latents), "caption": random_array(self.captions)}
        return [state, {name: jax.device_put(a.astype(np.float16)) for name, a in batch.items()}, jax.random.key(0)]

    def once(self) -> Any:
        self.arguments[0], metrics = self.program(*self.arguments)  # the old state was donated
        return self.arguments[0], metrics


class Sampling(Job):
    """Heun's sampler with guidance, without decoding; the compiled program is one call of the denoiser."""

    def lower(self) -> Any:
        def denoise(params: Any, x: jax.Array, sigma: jax.Array, y: jax.Array) -> jax.Array:
            F = guide(bind(self.network, params, jnp.dtype(self.setting.dtype)), GUIDANCE)
            return edm.denoise(F, x, sigma, y)

        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (self.latents, (1,), self.captions)]
        return jax.jit(denoise).lower(abstract_params(self.network), *shapes)

    def make_arguments(self) -> Any:
        inputs = [jax.device_put(random_array(shape)) for shape in (self.latents, self.captions)]
        return [random_params(self.network), *inputs]

    def once(self) -> Any:
        params, noise, y = self.arguments
        D = lambda x, sigma: self.program(params, x, np.full(1, sigma, np.float32), y)  # noqa: E731
        return sample(D, noise, noise_levels(self.setting.steps))


class Layers(Device):
    """Single layers of the network, forward and backward, on all tokens."""

    def prepare(self) -> dict[str, Any]:
        self.programs = {name: (jax.jit(function), arguments) for name, (function, arguments) in self.make().items()}
        return self.hello()

    def run(self, times: int) -> dict[str, Any]:
        """Returns the milliseconds of each layer."""
        answer = {}
        for name, (function, arguments) in self.programs.items():
            jax.block_until_ready(function(*arguments))
            started = time.monotonic()
            for _ in range(times):
                out = function(*arguments)
            jax.block_until_ready(out)
            answer[name] = 1000 * (time.monotonic() - started) / times
        return answer

    def make(self) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
        config, dtype = self.network, jnp.dtype(self.setting.dtype)
        B, N, d = self.setting.batch_size, config.tokens, config.dim
        x = jax.device_put(random_array((B, N, d))).astype(dtype)
        blocks = (*config.mixer_blocks(), *config.backbone_blocks())
        widest = max(block.hidden_width for block in blocks if block.moe)

        def experts(hidden: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            layer = ExpertChoiceFFN(
                d, hidden, config.num_experts, config.expert_capacity, out_std=0.02, dtype=dtype, rngs=nnx.Rngs(0)
            )
            graphdef, params = nnx.split(layer)
            return with_gradients(lambda p, x: nnx.merge(graphdef, p)(x), of=(0, 1)), (params, x)

        def drop(x: jax.Array, key: jax.Array) -> jax.Array:
            mask = random_mask(key, B, N, self.setting.mask_ratio)
            assert mask is not None
            return restore_tokens(drop_tokens(x, mask), mask)

        return {
            "expert_layer_ms": experts(widest), "expert_dispatch_ms": experts(NARROW_EXPERTS),
            "token_drop_ms": (with_gradients(drop, of=(0,)), (x, jax.random.key(0))),
        }  # fmt: skip


def with_gradients(function: Callable[..., jax.Array], of: tuple[int, ...]) -> Callable[..., Any]:
    """Returns the gradient function of the mean square of a function's result, for the arguments in `of`."""

    def mean_square(*arguments: Any) -> jax.Array:
        return jnp.mean(jnp.square(function(*arguments).astype(jnp.float32)))

    return jax.grad(mean_square, argnums=of)


def random_params(network: Any) -> dict[str, jax.Array]:
    """Returns norm scales of 1 and other parameters of about 0.02; much faster than the initialization of XL."""
    params = {}
    for name, leaf in abstract_params(network).items():
        value = np.ones(leaf.shape, np.float32) if name.endswith("scale") else 0.02 * random_array(leaf.shape)
        params[name] = jax.device_put(value)
    return params


@functools.cache
def _normals() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(2**20 - 3, np.float32)


def random_array(shape: tuple[int, ...]) -> np.ndarray:
    """Returns float32 samples of a unit normal distribution that repeat after 2^20 - 3 entries."""
    return np.resize(_normals(), shape)


def peak_bytes(device: Any) -> int:
    """Returns the peak memory of the device, or of this process if the device does not report it."""
    in_use = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if in_use is not None:
        return in_use
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
