"""The settings that all phases of a run share, read from the config and validated."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from micro_dit.errors import UserError, removed_field
from micro_dit.models.config import REMAT, DiTConfig
from micro_dit.parallel import mesh as meshes
from micro_dit.training.lora import LoRA, Trainable, make_lora
from micro_dit.training.optimizer import OPTIMIZERS, make_optimizer
from micro_dit.training.phases import Phase


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings that all phases of a run share.

    Attributes:
        sigma_data: Standard deviation of the latents.
        caption_drop: Probability that a caption embedding is replaced by zeros in training.
        dtype: Dtype of the matrix products.
        remat: Rematerialization policy, see `micro_dit.models.blocks.DiTBlock`.
        adam: b1, b2, eps and weight_decay of `make_optimizer`.
        microbatch: Images per forward and backward pass, over all devices; 0 processes the whole batch at once.
        lora: LoRA adapter to train; None trains all parameters of the network.
        optimizer_name: One of OPTIMIZERS.
        path_drop: Probability that an image skips the backbone in training; requires a network with `fusion`.
    """

    sigma_data: float
    caption_drop: float
    dtype: str
    remat: str
    adam: Mapping[str, float]
    microbatch: int = 0
    lora: LoRA | None = None
    optimizer_name: str = "adamw"
    path_drop: float = 0.0

    def __post_init__(self) -> None:
        """Raises UserError for an unknown `remat` or optimizer, and for a path drop out of range."""
        if self.remat not in REMAT:
            raise UserError(f"remat is {self.remat!r}. Set --config.remat to one of {', '.join(REMAT)}.")
        if self.optimizer_name not in OPTIMIZERS:
            raise UserError(
                f"optimizer is {self.optimizer_name!r}. Set --config.optimizer to one of {', '.join(OPTIMIZERS)}."
            )
        if not 0 <= self.path_drop < 1:
            raise UserError(
                f"diffusion.path_drop is {self.path_drop}. Set --config.diffusion.path_drop to a value in [0, 1)."
            )

    def optimizer(self, phase: Phase, mesh: jax.sharding.Mesh | None = None) -> optax.GradientTransformation:
        """Returns the optimizer of a phase without its learning rate. On a mesh, Muon distributes the matrices."""
        return make_optimizer(phase.clip, **self.adam, name=self.optimizer_name, dtype=jnp.dtype(self.dtype), mesh=mesh)

    def trainable(self, network: DiTConfig) -> Trainable:
        """Returns a description of the trained parameters: the full network, or a LoRA adapter."""
        return Trainable(network, self.lora)

    def check_batch(self, phase: Phase, mesh: jax.sharding.Mesh) -> None:
        """Raises UserError if the batch of a phase can't be split evenly over microbatches and devices."""
        meshes.check_batch(mesh, phase.batch_size, f"batch_size of phase {phase.name!r}")
        if self.microbatch:
            meshes.check_batch(mesh, self.microbatch, "microbatch")
            if phase.batch_size % self.microbatch:
                raise UserError(
                    f"microbatch {self.microbatch} does not divide batch_size {phase.batch_size} of phase "
                    f"{phase.name!r}. Set --config.microbatch to a divisor, or to 0 for the whole batch at once."
                )


def make_recipe(config: Mapping[str, Any]) -> Recipe:
    """Builds the recipe from the fields of a config, see configs/mask75.py.

    Raises:
        UserError: A value is unknown or out of range, a removed field is set, or LoRA has no weights to start from.
    """
    if config.get("quantize"):
        raise removed_field("quantize")
    lora = make_lora(**config["lora"])
    if lora and not config["init_from"]:
        raise UserError(
            f"lora.rank is {lora.rank}, but init_from is empty, so that there are no weights to adapt. Set "
            "--config.init_from to a model folder or a work directory, or --config.lora.rank=0."
        )
    return Recipe(
        **config["diffusion"], dtype=config["dtype"], remat=config["remat"], adam=dict(config["adam"]),
        optimizer_name=config["optimizer"], microbatch=config["microbatch"], lora=lora,
    )  # fmt: skip
