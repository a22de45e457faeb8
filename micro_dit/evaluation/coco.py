"""COCO's zero-shot protocol: 30,000 captions of the 2014 validation images, one for an image, the same list for all."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from micro_dit.errors import UserError

IMAGES = 30_000


class CocoPrompt(NamedTuple):
    """A caption, and the image it is of."""

    prompt: str
    file_name: str


def read_coco_prompts(path: str | Path, limit: int = IMAGES, seed: int = 0) -> list[CocoPrompt]:
    """A fixed choice of captions out of `captions_val2014.json`.

    Which images, which of an image's captions, and their order follow from hashes of the ids and the seed, and so from
    no library's random numbers. A shorter list is the beginning of a longer one.

    Args:
        path: the file, with 'images' (id, file_name) and 'annotations' (image_id, id, caption).
        limit: the most prompts.
        seed: another one gives another choice.

    Raises:
        UserError: the file can't be read, or is another one.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        files = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        captions: dict[int, dict[int, str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(int(annotation["image_id"]), {})[int(annotation["id"])] = str(annotation["caption"])
    except OSError as error:
        raise UserError(f"the captions {path} can't be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is no file of COCO captions ({type(error).__name__}: {error}); take captions_val2014.json of "
            "https://cocodataset.org (annotations_trainval2014.zip)."
        ) from error
    chosen = sorted((image for image in captions if image in files), key=lambda image: _order(seed, "image", image))
    if not chosen:
        raise UserError(f"{path} has no captions of its images.")

    def caption_of(image: int) -> str:
        return captions[image][min(captions[image], key=lambda caption: _order(seed, "caption", caption))]

    return [CocoPrompt(" ".join(caption_of(image).split()), files[image]) for image in chosen[:limit]]


def _order(seed: int, kind: str, number: int) -> bytes:
    return hashlib.sha256(f"{seed} {kind} {number}".encode()).digest()
