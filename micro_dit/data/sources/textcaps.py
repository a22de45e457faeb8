"""TextCaps: photographs with writing in them, five captions each.

    textcaps:FOLDER

The folder holds TextCaps_0.1_train.json and TextCaps_0.1_val.json, or one of them, and the images of both, either
unpacked (train_images/) or packed (train_val_images.zip).
"""

from collections import defaultdict
from pathlib import Path

from micro_dit.data.sources import Part, check_split, existing_path, slices
from micro_dit.data.sources.image_files import ImageFiles, Row, find_images
from micro_dit.data.sources.tables import read_json
from micro_dit.errors import UserError

ANNOTATIONS = {"train": "TextCaps_0.1_train.json", "validation": "TextCaps_0.1_val.json"}


class TextCaps:
    """TextCaps; see `micro_dit.data.sources.Source`. Ids are the images' ids; captions are grouped by image."""

    name = "textcaps"
    attribution = "TextCaps (https://textvqa.org/textcaps), CC BY 4.0; images from Open Images, CC BY 2.0"

    def __init__(self, path: str):
        """Looks for the annotations; raises UserError if there are none in the folder."""
        self.folder = existing_path(path, "folder of TextCaps")
        self.splits: tuple[str, ...] = tuple(s for s, file in ANNOTATIONS.items() if (self.folder / file).exists())
        if not self.splits:
            raise UserError(f"{self.folder} holds neither {' nor '.join(ANNOTATIONS.values())}: correct the folder.")

    def parts(self, split: str) -> list[Part]:
        """Reads the annotations of a split.

        Raises:
            UserError: They are not TextCaps', or there are no images.
        """
        check_split(self, split)
        file = self.folder / ANNOTATIONS[split]
        images, prefix = find_images(self.folder, "train_images", "train_val_images.zip")
        names: dict[str, str] = {}
        captions: dict[str, list[str]] = defaultdict(list)
        try:
            for entry in read_json(file)["data"]:
                id = entry["image_id"]
                names[id] = Path(entry.get("image_path") or f"{id}.jpg").name  # 'train/ID.jpg' lies in train_images/
                # Both hold captions: each entry has one of its own, and a list of all that belong to its image.
                captions[id] += [entry.get("caption_str"), *(entry.get("reference_strs") or ())]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not in TextCaps' format ({error!r}): download it again.") from error
        rows = [Row(id, f"{prefix}{name}", captions[id]) for id, name in sorted(names.items())]
        return [*slices(ImageFiles(images, rows))]
