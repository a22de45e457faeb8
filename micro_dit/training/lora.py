"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685): W is frozen; a trained product A·B is added to it."""

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

A, B = ".lora_a", ".lora_b"  # suffixes to the name of the adapted kernel


@dataclasses.dataclass(frozen=True)
class LoRA:
    """The settings of a LoRA adapter.

    Attributes:
        rank: Rank r of A·B.
        alpha: Scale of the update. The merged kernel is W + alpha / r · A·B.
        targets: Regular expression searched in parameter names. Matching kernels, (in, out) or (E, in, out) for
            experts, are adapted. Each expert has its own A and B.
    """

    rank: int
    alpha: float
    targets: str

    def __post_init__(self) -> None:
        """Raises UserError if a value is invalid."""
        if self.rank < 1 or self.alpha <= 0:
            raise UserError(
                f"lora.rank is {self.rank} and lora.alpha is {self.alpha}, but both must be positive. Set "
                "--config.lora.rank=0 to train without LoRA."
            )
        try:
            re.compile(self.targets)
        except re.error as error:
            raise UserError(
                f"lora.targets is {self.targets!r}, which is not a valid regular expression ({error}). Correct "
                "--config.lora.targets."
            ) from error

    def abstract(self, base: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the adapter, A (…, in, r) and B (…, r, out) float32, by parameter name.

        Args:
            base: Parameters of the network, or their shapes, by name.

        Raises:
            UserError: `targets` matches no kernel, or A and B are not smaller than a matching kernel.
        """
        adapter = {}
        for name, leaf in base.items():
            if len(leaf.shape) < 2 or not re.search(self.targets, name):
                continue
            *experts, wide, out = leaf.shape
            if self.rank * (wide + out) >= wide * out:
                raise UserError(
                    f"With lora.rank {self.rank} the adapter of {name} would not be smaller than the kernel itself, "
                    f"which is {wide}×{out}. Lower --config.lora.rank, or exclude the kernel from "
                    "--config.lora.targets."
                )
            adapter[name + A] = jax.ShapeDtypeStruct((*experts, wide, self.rank), jnp.float32)
            adapter[name + B] = jax.ShapeDtypeStruct((*experts, self.rank, out), jnp.float32)
        if not adapter:
            some = ", ".join([name for name, leaf in base.items() if len(leaf.shape) > 1][:3])
            raise UserError(
                f"lora.targets is {self.targets!r}, which matches no kernel. Set --config.lora.targets to a regular "
                f"expression that is found in kernel names such as {some}."
            )
        return adapter

    def init(self, base: Mapping[str, Any], key: jax.Array) -> Params:
        """Initializes A from a normal distribution with variance 1 / in and B with zeros, so that A·B is zero."""
        adapter: Params = {}
        for number, (name, leaf) in enumerate(self.abstract(base).items()):
            normal = jax.random.normal(jax.random.fold_in(key, number), leaf.shape) / math.sqrt(leaf.shape[-2])
            adapter[name] = normal if name.endswith(A) else jnp.zeros(leaf.shape)
        return adapter

    def merge(self, base: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters W + alpha / r · A·B, float32; parameters without an adapter are those of `base`."""
        merged = dict(base)
        for name in adapter:
            if name.endswith(A):
                kernel = name.removesuffix(A)
                product = jnp.matmul(adapter[name], adapter[kernel + B], precision=jax.lax.Precision.HIGHEST)
                merged[kernel] = base[kernel] + self.alpha / self.rank * product
        return merged


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The parameters that a run trains: the full network, or a LoRA adapter.

    Attributes:
        network: The network.
        lora: Settings of the adapter; None trains all parameters of the network.
    """

    network: DiTConfig
    lora: LoRA | None = None

    def abstract(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the trained parameters by name.

        Raises:
            UserError: The adapter's settings are invalid for the network.
        """
        params = abstract_params(self.network)
        return self.lora.abstract(params) if self.lora else params

    def init(self, key: jax.Array) -> Params:
        """Initializes the trained parameters."""
        return self.lora.init(abstract_params(self.network), key) if self.lora else init_params(self.network, key)

    def merge(self, params: Params, base: Mapping[str, Any] | None) -> Params:
        """Returns the full network parameters, with the adapter merged into `base` if there is one.

        Args:
            params: The trained parameters.
            base: Frozen parameters that the adapter is added to; None without LoRA.
        """
        return params if self.lora is None or base is None else self.lora.merge(base, params)


def make_lora(rank: int, alpha: float, targets: str) -> LoRA | None:
    """Returns the settings of the adapter, or None for rank 0, which trains all parameters of the network.

    Raises:
        UserError: A value is invalid.
    """
    return None if rank == 0 else LoRA(rank, float(alpha), targets)
