"""Reads COCO 2014: photographs with five captions each. Its validation split is a benchmark of text-to-image models.

    coco:FOLDER

The folder contains annotations/captions_val2014.json and the images, either unpacked (val2014/) or packed
(val2014.zip). The train split is available if the corresponding files of train2014 exist.
"""

from collections import defaultdict

from micro_dit.data.sources import Part, check_split, existing_path, slices
from micro_dit.data.sources.image_files import ImageFiles, Row, find_images
from micro_dit.data.sources.tables import read_json
from micro_dit.errors import UserError

SETS = {"train": "train2014", "validation": "val2014"}


class COCO:
    """The COCO 2014 source; see `micro_dit.data.sources.Source`. Ids are file names without the suffix."""

    name = "coco"
    attribution = "COCO 2014 (https://cocodataset.org), annotations CC BY 4.0; images under Flickr's terms of use"

    def __init__(self, path: str):
        """Finds the annotations; raises UserError if the folder contains none."""
        self.folder = existing_path(path, "folder of COCO")
        self.annotations = {split: self.folder / f"annotations/captions_{name}.json" for split, name in SETS.items()}
        self.splits: tuple[str, ...] = tuple(split for split, file in self.annotations.items() if file.exists())
        if not self.splits:
            raise UserError(
                f"{self.folder} has no annotations/captions_val2014.json. Correct the folder in --source=coco:FOLDER."
            )

    def parts(self, split: str) -> list[Part]:
        """Reads the captions of a split and returns slices of its images, sorted by name.

        Raises:
            UserError: The annotations are not in COCO format, or there are no images.
        """
        check_split(self, split)
        images, prefix = find_images(self.folder, SETS[split], f"{SETS[split]}.zip")
        captions: dict[int, list[str]] = defaultdict(list)
        try:
            content = read_json(self.annotations[split])
            for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
                captions[annotation["image_id"]].append(annotation["caption"].strip())
            names = sorted((image["file_name"], image["id"]) for image in content["images"])
        except (KeyError, TypeError, AttributeError) as error:
            file = self.annotations[split]
            raise UserError(f"{file} is not in COCO format ({error!r}). Download it again.") from error
        rows = [Row(name.partition(".")[0], f"{prefix}{name}", captions.get(id)) for name, id in names]
        return [*slices(ImageFiles(images, rows))]
