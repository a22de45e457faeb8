"""What all phases of a run have in common, read from its config and checked."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

from micro_dit.errors import UserError, removed_field
from micro_dit.models.config import REMAT
from micro_dit.parallel import mesh as meshes
from micro_dit.training.lora import LoRA, make_lora
from micro_dit.training.optimizer import make_optimizer
from micro_dit.training.phases import Phase


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all phases of a run have in common.

    Attributes:
        sigma_data: standard deviation of the latents.
        caption_drop: probability that a caption's embedding is zeroed in training.
        dtype: of the matrix products.
        remat: what the backward pass computes again, see `micro_dit.models.blocks.DiTBlock`.
        adam: b1, b2, eps and weight_decay of `make_optimizer`.
        microbatch: images per forward and backward pass over all devices; 0 takes the whole batch at once.
        lora: the adapter that is trained in place of the network's parameters; None trains those.
    """

    sigma_data: float
    caption_drop: float
    dtype: str
    remat: str
    adam: Mapping[str, float]
    microbatch: int = 0
    lora: LoRA | None = None

    def optimizer(self, phase: Phase) -> optax.GradientTransformation:
        """Returns the optimizer of a phase."""
        return make_optimizer(phase.clip, **self.adam)

    def check_batch(self, phase: Phase, mesh: jax.sharding.Mesh) -> None:
        """Raises UserError if a phase's batch can't be split evenly over microbatches and devices."""
        meshes.check_batch(mesh, phase.batch_size, f"batch_size of phase {phase.name!r}")
        if self.microbatch:
            meshes.check_batch(mesh, self.microbatch, "microbatch")
            if phase.batch_size % self.microbatch:
                raise UserError(
                    f"microbatch {self.microbatch} does not divide batch_size {phase.batch_size} of phase "
                    f"{phase.name!r}; use a divisor, or 0 for the whole batch at once."
                )


def with_mask_ratio(config: Any) -> Any:
    """The config with its masking.ratio, if that is set, as mask_ratio of all phases that mask."""
    if config.masking.ratio is None:
        return config
    config, ratio = copy.deepcopy(config), {"mask_ratio": config.masking.ratio}
    config.phases = tuple({**phase, **(ratio if phase.get("mask_ratio") else {})} for phase in config.phases)
    return config


def make_recipe(config: Any) -> Recipe:
    """The recipe of a config; raises UserError for an unknown `remat`, a removed field, or a LoRA that can't be."""
    if config.remat not in REMAT:
        raise UserError(f"remat {config.remat!r} is unknown; use one of {', '.join(REMAT)}.")
    if config.get("quantize"):
        raise removed_field("quantize")
    diffusion, lora = config.diffusion, make_lora(**config.lora)
    if lora and not config.init_from:
        raise UserError("LoRA adapts weights that are there: name them with --config.init_from, or set lora.rank 0.")
    return Recipe(
        diffusion.sigma_data, diffusion.caption_drop, config.dtype, config.remat, dict(config.adam), config.microbatch,
        lora,
    )  # fmt: skip
