"""The PyTorch twin as a contender: training steps, sampling and single layers. See benchmarks/contenders.py."""

import abc
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import torch_twin
from benchmarks.contenders import GUIDANCE, NARROW_EXPERTS, Setting, cpu_seconds
from micro_dit.errors import UserError


class Device:
    """The device of the twin, and its inputs."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.network = setting, setting.network()
        if setting.gpu and not torch.cuda.is_available():
            raise UserError(f"torch {torch.__version__} found no GPU. Install its CUDA build, see pytorch.org.")
        self.device = torch.device("cuda" if setting.gpu else "cpu")
        if setting.gpu:
            torch.set_float32_matmul_precision("high")  # JAX's default
            torch.cuda.set_per_process_memory_fraction(0.9)
        torch.manual_seed(0)
        B, side, L = setting.batch_size, self.network.input_size, setting.caption_tokens
        self.x = torch.randn(B, self.network.in_channels, side, side, device=self.device)
        self.y = torch.randn(B, L, self.network.caption_channels, device=self.device)

    def hello(self) -> dict[str, Any]:
        """Returns the name of the device."""
        return {"device": torch.cuda.get_device_name() if self.setting.gpu else "cpu"}

    def wait(self) -> None:
        if self.setting.gpu:
            torch.cuda.synchronize()


class Job(Device, abc.ABC):
    """A function that is prepared once and then run repeatedly."""

    def prepare(self) -> dict[str, Any]:
        """Runs the function once, which also compiles it if `setting.compiled`."""
        started, cpu = time.monotonic(), cpu_seconds()
        self.once()
        self.wait()
        return self.hello() | {"compile_s": time.monotonic() - started, "compile_cpu_s": cpu_seconds() - cpu}

    def run(self, times: int) -> dict[str, Any]:
        """Returns seconds per run, averaged over `times` runs, and peak memory; on a GPU, that of these runs."""
        self.wait()
        if self.setting.gpu:
            torch.cuda.reset_peak_memory_stats()
        started, cpu = time.monotonic(), cpu_seconds()
        for _ in range(times):
            self.once()
        self.wait()
        wall, cpu = time.monotonic() - started, cpu_seconds() - cpu
        return {"wall_s": wall / times, "cpu_s": cpu / times, "peak_gb": self.peak_bytes() / 1e9}

    def peak_bytes(self) -> int:
        if self.setting.gpu:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    @abc.abstractmethod
    def once(self) -> Tensor:
        """Runs the function once, without waiting for the GPU."""


class Training(Job):
    """The training step, with the largest microbatch that fits on the GPU without torch.compile."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.x, self.y = self.x.half(), self.y.half()
        self.twin = torch_twin.TorchTwin(self.network).to(self.device)
        self.microbatch = setting.microbatch or setting.batch_size
        self.training = self.make_training(compiled=False)

    def make_training(self, compiled: bool) -> torch_twin.Training:
        return torch_twin.Training(
            self.twin, learning_rate=2.4e-4, clip=0.25, P_mean=-0.6, P_std=1.2, mask_ratio=self.setting.mask_ratio,
            microbatch=self.microbatch, compiled=compiled,
        )  # fmt: skip

    def prepare(self) -> dict[str, Any]:
        while self.setting.gpu and not self.fits():
            self.microbatch //= 2
        self.training = self.make_training(self.setting.compiled)
        return super().prepare() | {"microbatch": self.microbatch}

    def fits(self) -> bool:
        """Returns whether a step of two microbatches (or of the whole batch, if smaller) fits into the GPU's memory."""
        rows = slice(0, 2 * self.microbatch)
        try:
            self.make_training(compiled=False).step(self.x[rows], self.y[rows])
        except torch.OutOfMemoryError:
            if self.microbatch == 1:
                raise UserError("The twin's step does not fit into GPU memory, even with a microbatch of 1.") from None
            return False
        finally:
            self.twin.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return True

    def once(self) -> Tensor:
        return self.training.step(self.x, self.y)


class Sampling(Job):
    """Heun's sampler with guidance, without decoding."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        twin = torch_twin.TorchTwin(self.network).to(self.device, getattr(torch, setting.dtype)).requires_grad_(False)
        self.twin = torch.compile(twin, dynamic=False) if setting.compiled else twin

    def once(self) -> Tensor:
        return torch_twin.heun(self.twin, self.x, self.y, self.setting.steps, GUIDANCE)


class Layers(Device):
    """Single layers of the network, forward and backward, on all tokens."""

    def prepare(self) -> dict[str, Any]:
        self.functions = self.make()
        return self.hello()

    def run(self, times: int) -> dict[str, Any]:
        """Returns the milliseconds of each layer."""
        answer = {}
        for name, function in self.functions.items():
            function()
            self.wait()
            started = time.monotonic()
            for _ in range(times):
                function()
            self.wait()
            answer[name] = 1000 * (time.monotonic() - started) / times
        return answer

    def make(self) -> dict[str, Callable[[], Any]]:
        config = self.network
        B, N, d = self.setting.batch_size, config.tokens, config.dim
        x = torch.randn(B, N, d, device=self.device, dtype=getattr(torch, self.setting.dtype), requires_grad=True)
        blocks = (*config.mixer_blocks(), *config.backbone_blocks())
        widest = max(block.hidden_width for block in blocks if block.moe)

        def drop(x: Tensor) -> Tensor:
            order = torch.rand(B, N, device=self.device).argsort(dim=1)
            kept = torch_twin.gather_tokens(x, order[:, : torch_twin.kept_tokens(N, self.setting.mask_ratio)])
            padded = torch.cat([kept, torch.zeros(B, N - kept.shape[1], d, device=self.device, dtype=x.dtype)], dim=1)
            return torch_twin.gather_tokens(padded, order.argsort(dim=1))

        def with_gradients(function: Callable[[Tensor], Tensor], *parameters: Tensor) -> Callable[[], Any]:
            def mean_square() -> Tensor:
                with torch_twin.autocast(self.device):
                    return function(x).float().square().mean()

            compiled = torch.compile(mean_square, dynamic=False) if self.setting.compiled else mean_square
            return lambda: torch.autograd.grad(compiled(), (x, *parameters))

        def experts(hidden: int) -> Callable[[], Any]:
            layer = torch_twin.ExpertChoice(d, hidden, config).to(self.device)
            return with_gradients(layer, *layer.parameters())

        return {
            "expert_layer_ms": experts(widest), "expert_dispatch_ms": experts(NARROW_EXPERTS),
            "token_drop_ms": with_gradients(drop),
        }  # fmt: skip
