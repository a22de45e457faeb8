"""Prompts of the zero-shot COCO protocol: 30,000 captions of the 2014 validation images, one caption per image."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from micro_dit.errors import UserError

IMAGES = 30_000


class CocoPrompt(NamedTuple):
    """A caption and the file name of its image."""

    prompt: str
    file_name: str


def read_coco_prompts(path: str | Path, limit: int = IMAGES, seed: int = 0) -> list[CocoPrompt]:
    """Returns a reproducible selection of captions from `captions_val2014.json`.

    Images, captions and their order are selected by hashes of the ids and the seed, so they do not depend on the random
    numbers of any library. A shorter list is a prefix of a longer one.

    Args:
        path: JSON file with 'images' (id, file_name) and 'annotations' (image_id, id, caption).
        limit: Largest number of prompts.
        seed: Seed of the selection.

    Raises:
        UserError: The file can't be read or has another format.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        files = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        captions: dict[int, dict[int, str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(int(annotation["image_id"]), {})[int(annotation["id"])] = str(annotation["caption"])
    except OSError as error:
        raise UserError(f"The captions file {path} can't be read ({error.strerror}). Check --prompts.") from error
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a COCO captions file ({type(error).__name__}: {error}). Set --prompts to "
            "captions_val2014.json from https://cocodataset.org (annotations_trainval2014.zip)."
        ) from error
    chosen = sorted((image for image in captions if image in files), key=lambda image: _order(seed, "image", image))
    if not chosen:
        raise UserError(
            f"{path} has no image with a caption. Set --prompts to captions_val2014.json from https://cocodataset.org."
        )

    def caption_of(image: int) -> str:
        return captions[image][min(captions[image], key=lambda caption: _order(seed, "caption", caption))]

    return [CocoPrompt(" ".join(caption_of(image).split()), files[image]) for image in chosen[:limit]]


def _order(seed: int, kind: str, number: int) -> bytes:
    return hashlib.sha256(f"{seed} {kind} {number}".encode()).digest()
