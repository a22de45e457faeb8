"""Captioned images: what a source is, and the table of those that come with the package."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from micro_dit.errors import UserError


class Example(NamedTuple):
    """One captioned image.

    Attributes:
        id: Unique within the source and stable between versions of it.
        image: An encoded image file (PNG, JPEG, ...).
        caption: What the image shows.
    """

    id: str
    image: bytes
    caption: str


class Source(Protocol):
    """A data set of captioned images, cut into named splits."""

    name: str
    attribution: str
    splits: tuple[str, ...]

    def examples(self, split: str) -> Sequence[Example]:
        """Returns the examples of a split; each is read or drawn only when it is indexed."""
        ...


def _open_openmoji(argument: str, px: int) -> Source:
    from micro_dit.data.sources.openmoji import OpenMoji

    return OpenMoji(groups=tuple(argument.split(",")) if argument else None, px=px)


SOURCES = {"openmoji": _open_openmoji}


def open_source(spec: str, px: int) -> Source:
    """Opens a source by name.

    Args:
        spec: `name` or `name:argument`, for example `openmoji` or `openmoji:smileys-emotion,animals-nature`.
        px: Side in pixels at which vector images are drawn; sources of pixel images keep their own sizes.

    Raises:
        UserError: The name is not known, or the source refuses the argument.
    """
    name, _, argument = spec.partition(":")
    if name not in SOURCES:
        raise UserError(f"There is no data source '{name}' (asked for by '{spec}'); known ones: {', '.join(SOURCES)}.")
    return SOURCES[name](argument, px)
