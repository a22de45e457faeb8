"""COCO 2014: photographs with five captions each; its validation split is what text-to-image models are measured on.

    coco:FOLDER

The folder holds annotations/captions_val2014.json and the images, unpacked (val2014/) or packed (val2014.zip); the
same with train2014, if that is wanted.
"""

from collections import defaultdict

from micro_dit.data.sources import Part, check_split, existing_path, slices
from micro_dit.data.sources.image_files import ImageFiles, Row, find_images
from micro_dit.data.sources.tables import read_json
from micro_dit.errors import UserError

SETS = {"train": "train2014", "validation": "val2014"}


class COCO:
    """COCO 2014; see `micro_dit.data.sources.Source`. Ids are file names without the ending."""

    name = "coco"
    attribution = "COCO 2014 (https://cocodataset.org), annotations CC BY 4.0; images under Flickr's terms of use"

    def __init__(self, path: str):
        """Looks for the annotations; raises UserError if there are none in the folder."""
        self.folder = existing_path(path, "folder of COCO")
        self.annotations = {split: self.folder / f"annotations/captions_{name}.json" for split, name in SETS.items()}
        self.splits: tuple[str, ...] = tuple(split for split, file in self.annotations.items() if file.exists())
        if not self.splits:
            raise UserError(f"{self.folder} has no annotations/captions_val2014.json: correct the folder.")

    def parts(self, split: str) -> list[Part]:
        """Reads the captions of a split; images are in the order of their names.

        Raises:
            UserError: The annotations are not COCO's, or there are no images.
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
            raise UserError(f"{file} is not in COCO's format ({error!r}): download it again.") from error
        rows = [Row(name.partition(".")[0], f"{prefix}{name}", captions.get(id)) for name, id in names]
        return [*slices(ImageFiles(images, rows))]
