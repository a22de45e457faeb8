"""Settings of a preparation: what is prepared, with which encoders, and how."""

import dataclasses
from collections.abc import Sequence

from micro_dit.data.shards import POSTERIORS
from micro_dit.errors import UserError
from micro_dit.files import hash_to_unit


@dataclasses.dataclass(frozen=True)
class PreparationSettings:
    """How a data set becomes shards.

    Attributes:
        source: Name of the source and its argument, as in 'openmoji:smileys-emotion,animals-nature'.
        resolutions: Sides of the square images in pixels, ascending; a record holds the latents of all of them.
        vae: Image encoder: a folder in diffusers' format, or a name on the Hugging Face hub.
        text_encoder: Name of the text encoder.
        posterior: 'mean_std' stores the distribution of the latents, 'sample' one sample of it, in half the space.
        minimum_side: Images with a smaller side are dropped; by default the smallest resolution. Images between this
            and a larger resolution are enlarged, and counted.
        caption_tokens: Tokens of a caption embedding, by default the encoder's own number; longer captions are cut,
            and counted.
        clean_captions: Whether to apply `micro_dit.data.captions.clean_caption`.
        validation: Share of the examples that go to a split 'validation', by a hash of their ids; for a source whose
            only split is 'train'.
        dtype: Dtype of the encoders' matrix products, 'float32' or 'bfloat16'.
        seed: Seed of the posterior's samples; a sample depends only on it, the resolution and the example's id.
        batch_size: Images encoded at once, on all devices of this host together.

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
            raise UserError("Resolutions and batch size must be positive: correct the one that is not.")
        if self.posterior not in POSTERIORS:
            raise UserError(f"Unknown posterior '{self.posterior}': choose one of {', '.join(POSTERIORS)}.")
        if not 0 <= self.validation < 1:
            raise UserError(f"The share for validation must be at least 0 and less than 1, not {self.validation}.")

    @property
    def smallest_side(self) -> int:
        """The side in pixels below which an image is dropped."""
        return self.resolutions[0] if self.minimum_side is None else self.minimum_side

    def split_of(self, id: str, split: str) -> str:
        """Returns the split that an example goes to."""
        return "validation" if hash_to_unit(id) < self.validation else split
