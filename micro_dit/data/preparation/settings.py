"""Settings of a preparation: the source, the encoders and their options."""

import dataclasses
from collections.abc import Sequence

from micro_dit.data.shards import POSTERIORS
from micro_dit.errors import UserError
from micro_dit.files import hash_to_unit


@dataclasses.dataclass(frozen=True)
class PreparationSettings:
    """Settings that determine the contents of shards.

    Attributes:
        source: Name of the source and its argument, such as 'openmoji:smileys-emotion,animals-nature'.
        resolutions: Sides of the square images in pixels, ascending; a record contains the latents of all of them.
        vae: Image encoder: a folder in Diffusers format, or a model on the Hugging Face Hub.
        text_encoder: Name of the text encoder.
        posterior: 'mean_std' stores the mean and standard deviation of the latents; 'sample' stores one sample, which
            needs half the space.
        minimum_side: Images with a smaller side are dropped; by default the smallest resolution. Images that are
            smaller than another resolution are enlarged and counted.
        caption_tokens: Tokens per caption embedding, by default the maximum of the encoder; longer captions are
            truncated and counted.
        clean_captions: Whether to apply `micro_dit.data.captions.clean_caption`.
        validation: Fraction of the examples assigned to the split 'validation' by a hash of their ids; only for sources
            whose only split is 'train'.
        dtype: Dtype of the matrix products of the encoders, 'float32' or 'bfloat16'.
        seed: Seed of the posterior samples; a sample depends only on the seed, the resolution and the id.
        batch_size: Images per encoder batch, over all devices of this host.

    Raises:
        UserError: A value is out of range.
    """

    source: str
    resolutions: Sequence[int]
    vae: str
    text_encoder: str = "minilm"
    posterior: str = "mean_std"
    minimum_side: int | None = None
    caption_tokens: int | None = None
    clean_captions: bool = True
    validation: float = 0.0
    dtype: str = "float32"
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "resolutions", tuple(sorted(set(self.resolutions))))
        if not self.resolutions or min(*self.resolutions, self.batch_size) < 1:
            raise UserError(
                f"--resolutions and --batch_size must be positive, not {list(self.resolutions)} and {self.batch_size}."
            )
        if self.posterior not in POSTERIORS:
            raise UserError(f"Unknown posterior '{self.posterior}'. Set --posterior to one of {', '.join(POSTERIORS)}.")
        if not 0 <= self.validation < 1:
            raise UserError(f"--validation must be at least 0 and less than 1, not {self.validation}.")

    @property
    def smallest_side(self) -> int:
        """The minimum side of an image in pixels, below which it is dropped."""
        return self.resolutions[0] if self.minimum_side is None else self.minimum_side

    def split_of(self, id: str, split: str) -> str:
        """Returns the output split of an example, given its id and its split in the source."""
        return "validation" if hash_to_unit(id) < self.validation else split
