"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685): W stays as it is, A·B is trained and added to it."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from micro_dit.errors import UserError
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import Params, abstract_params, init_params

A, B = ".lora_a", ".lora_b"  # behind the name of the kernel that they adapt


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which kernels are adapted, and how.

    Attributes:
        rank: Width r between A and B.
        alpha: Scale: the merged kernel is W + alpha / r · A·B.
        targets: Regular expression, searched in the names of kernels (in, out), and (E, in, out) of experts, each of
            which gets its own A and B.
    """

    rank: int
    alpha: float
    targets: str

    def __post_init__(self) -> None:
        """Raises UserError for an impossible value."""
        if self.rank < 1 or self.alpha <= 0:
            raise UserError(f"lora.rank {self.rank} and lora.alpha {self.alpha}: both must be above 0.")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise UserError(f"lora.targets {self.targets!r} is no regular expression ({error}); correct it.") from error

    def abstract(self, base: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns names and shapes of the adapter for a network's parameters: A (…, in, r), B (…, r, out).

        Raises:
            UserError: No kernel matches `targets`, or an adapter would not be smaller than its kernel.
        """
        adapter = {}
        for name, leaf in base.items():
            if len(leaf.shape) < 2 or not re.search(self.targets, name):
                continue
            *experts, wide, out = leaf.shape
            if self.rank * (wide + out) >= wide * out:
                raise UserError(
                    f"lora.rank {self.rank} makes an adapter no smaller than {name}, which is {wide}×{out}: take a "
                    "lower rank, or lora.targets that leave that kernel out."
                )
            adapter[name + A] = jax.ShapeDtypeStruct((*experts, wide, self.rank), jnp.float32)
            adapter[name + B] = jax.ShapeDtypeStruct((*experts, self.rank, out), jnp.float32)
        if not adapter:
            some = ", ".join([name for name, leaf in base.items() if len(leaf.shape) > 1][:3])
            raise UserError(f"lora.targets {self.targets!r} is found in no kernel's name; they are called {some}, ….")
        return adapter

    def init(self, base: Mapping[str, Any], key: jax.Array) -> Params:
        """Initializes an adapter that changes nothing yet: A normal with variance 1 / in, B zero."""
        adapter: Params = {}
        for number, (name, leaf) in enumerate(self.abstract(base).items()):
            normal = jax.random.normal(jax.random.fold_in(key, number), leaf.shape) / math.sqrt(leaf.shape[-2])
            adapter[name] = normal if name.endswith(A) else jnp.zeros(leaf.shape)
        return adapter

    def merge(self, base: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the merged parameters, float32: W + alpha / r · A·B. Those not adapted are the arrays of `base`."""
        merged = dict(base)
        for name in adapter:
            if name.endswith(A):
                kernel = name.removesuffix(A)
                product = jnp.matmul(adapter[name], adapter[kernel + B], precision=jax.lax.Precision.HIGHEST)
                merged[kernel] = base[kernel] + self.alpha / self.rank * product
        return merged


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The parameters that a run trains: those of the network, or a LoRA adapter for them.

    Attributes:
        network: The network.
        lora: The adapter; None trains the parameters of the network.
    """

    network: DiTConfig
    lora: LoRA | None = None

    def abstract(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Returns names and shapes of the trained parameters.

        Raises:
            UserError: The adapter does not fit the network.
        """
        params = abstract_params(self.network)
        return self.lora.abstract(params) if self.lora else params

    def init(self, key: jax.Array) -> Params:
        """Initializes the trained parameters."""
        return self.lora.init(abstract_params(self.network), key) if self.lora else init_params(self.network, key)

    def merge(self, params: Params, base: Mapping[str, Any] | None) -> Params:
        """Returns the network's parameters; `base` holds those under the adapter, None without LoRA."""
        return params if self.lora is None or base is None else self.lora.merge(base, params)


def make_lora(rank: int, alpha: float, targets: str) -> LoRA | None:
    """Returns the adapter's settings; None for rank 0, which trains the parameters of the network.

    Raises:
        UserError: A value is out of range.
    """
    return None if rank == 0 else LoRA(rank, float(alpha), targets)
