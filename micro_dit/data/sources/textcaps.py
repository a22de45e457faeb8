"""Reads TextCaps: photographs that contain text, with five captions each.

    textcaps:FOLDER

The folder contains TextCaps_0.1_train.json, TextCaps_0.1_val.json, or both, and the images, either unpacked
(train_images/) or packed (train_val_images.zip).
"""

from collections import defaultdict
from pathlib import Path

from micro_dit.data.sources import Part, check_split, existing_path, slices
from micro_dit.data.sources.image_files import ImageFiles, Row, find_images
from micro_dit.data.sources.tables import read_json
from micro_dit.errors import UserError

ANNOTATIONS = {"train": "TextCaps_0.1_train.json", "validation": "TextCaps_0.1_val.json"}


class TextCaps:
    """The TextCaps source; see `micro_dit.data.sources.Source`. Ids are image ids; captions are grouped by image."""

    name = "textcaps"
    attribution = "TextCaps (https://textvqa.org/textcaps), CC BY 4.0; images from Open Images, CC BY 2.0"

    def __init__(self, path: str):
        """Finds the annotations; raises UserError if the folder contains none."""
        self.folder = existing_path(path, "folder of TextCaps")
        self.splits: tuple[str, ...] = tuple(s for s, file in ANNOTATIONS.items() if (self.folder / file).exists())
        if not self.splits:
            raise UserError(
                f"{self.folder} has neither {' nor '.join(ANNOTATIONS.values())}. Correct the folder in "
                "--source=textcaps:FOLDER."
            )

    def parts(self, split: str) -> list[Part]:
        """Reads the annotations of a split and returns slices of its images, sorted by id.

        Raises:
            UserError: The annotations are not in TextCaps format, or there are no images.
        """
        check_split(self, split)
        file = self.folder / ANNOTATIONS[split]
        images, prefix = find_images(self.folder, "train_images", "train_val_images.zip")
        names: dict[str, str] = {}
        captions: dict[str, list[str]] = defaultdict(list)
        try:
            for entry in read_json(file)["data"]:
                id = entry["image_id"]
                names[id] = Path(entry.get("image_path") or f"{id}.jpg").name  # 'train/ID.jpg' is in train_images/
                # Each entry has one caption and the list of all captions of its image.
                captions[id] += [entry.get("caption_str"), *(entry.get("reference_strs") or ())]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not in TextCaps format ({error!r}). Download it again.") from error
        rows = [Row(id, f"{prefix}{name}", captions[id]) for id, name in sorted(names.items())]
        return [*slices(ImageFiles(images, rows))]
