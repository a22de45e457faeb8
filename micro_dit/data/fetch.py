"""Downloads the public data sets, in parallel; run it again after an interruption and it goes on where it stopped.

    python -m micro_dit.data.fetch --dataset=cc12m --out=raw/cc12m --fraction=0.01

Files are taken as they are published, and `micro_dit.precompute` reads them; `docs/data.md` has a section for each set.
"""

import hashlib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from absl import flags

from micro_dit.cli import run_command
from micro_dit.data.download import RemoteFile, download_all, first_line, is_whole, refused
from micro_dit.errors import UserError


class Dataset(NamedTuple):
    """Where a data set is published."""

    terms: str  # page with its license, where access is requested if necessary
    repository: str | None = None  # on the Hugging Face hub
    needed: tuple[str, ...] = ()  # files needed for any fraction: patterns in a repository, else URLs
    archives: tuple[str, ...] = ()  # patterns of image archives; the fraction is taken of those that match each
    linked: bool = False  # whether its files are listed in a file of links from the terms page


DATASETS = {
    "cc12m": Dataset(
        "https://huggingface.co/datasets/pixparse/cc12m-wds",
        "pixparse/cc12m-wds",
        ("_info.json",),
        ("cc12m-train-*.tar",),
    ),
    "textcaps": Dataset(
        "https://textvqa.org/textcaps/dataset",
        needed=(
            "https://dl.fbaipublicfiles.com/textvqa/data/textcaps/TextCaps_0.1_train.json",
            "https://dl.fbaipublicfiles.com/textvqa/data/textcaps/TextCaps_0.1_val.json",
            "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
        ),
    ),
    "coco": Dataset(
        "https://cocodataset.org/#termsofuse",
        needed=(
            "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
            "http://images.cocodataset.org/zips/val2014.zip",
        ),
    ),
    "diffusiondb": Dataset(
        "https://huggingface.co/datasets/poloclub/diffusiondb",
        repository="poloclub/diffusiondb",
        needed=("metadata-large.parquet",),
        archives=("diffusiondb-large-part-*/part-*.zip",),
    ),
    "journeydb": Dataset(
        "https://huggingface.co/datasets/JourneyDB/JourneyDB",
        repository="JourneyDB/JourneyDB",
        needed=("data/train/train_anno_realease_repath.jsonl.tgz", "data/valid/valid_anno_repath.jsonl.tgz"),
        archives=("data/train/imgs/*.tgz", "data/valid/imgs/*.tgz"),
    ),
    "sa1b": Dataset("https://ai.meta.com/datasets/segment-anything-downloads/", archives=("*.tar",), linked=True),
    "sa1b-captions": Dataset(
        "https://huggingface.co/datasets/PixArt-alpha/SAM-LLaVA-Captions10M",
        repository="PixArt-alpha/SAM-LLaVA-Captions10M",
        needed=("SA1B_caption.tar.gz",),
    ),
}


def fetch(
    dataset: str,
    out: str,
    fraction: float = 1.0,
    workers: int = 8,
    links: str | None = None,
    endpoint: str | None = None,
    report: Callable[[str], None] = print,
) -> list[str]:
    """Downloads a data set, or what is missing of it.

    Args:
        dataset: A name in `DATASETS`.
        out: Folder to fill.
        fraction: Share of the image archives; a larger one later keeps the files of a smaller one.
        workers: Files downloaded at once.
        links: File of names and URLs, for a data set that needs one.
        endpoint: Address of the hub; by default the environment's HF_ENDPOINT, or the public one.
        report: Called with each line of text.

    Returns:
        The names of all files that are now in the folder.

    Raises:
        UserError: An argument is wrong, access is refused, or some files (not the others) could not be downloaded.
    """
    if dataset not in DATASETS:
        raise UserError(f"There is no data set '{dataset}' to fetch; known ones: {', '.join(DATASETS)}.")
    if not 0 < fraction <= 1 or workers < 1:
        raise UserError("The fraction must be above 0 and at most 1, and there must be at least one worker.")
    terms = DATASETS[dataset].terms
    files = list_files(DATASETS[dataset], fraction, links, endpoint)
    folder = Path(out).expanduser()
    missing = [file for file in files if not is_whole(folder / file.name, file)]
    known = [file.size for file in missing if file.size is not None]
    size = f", {sum(known) / 1e9:.1f} GB" if len(known) == len(missing) else ""
    report(f"{dataset}: {len(missing)} of {len(files)} files to download{size}; terms of use: {terms}")
    download_all(missing, folder, workers, terms)
    return [file.name for file in files]


def list_files(dataset: Dataset, fraction: float, links: str | None, endpoint: str | None) -> list[RemoteFile]:
    """Lists the files of a data set, those that are needed whole first; raises UserError if that is impossible."""
    if dataset.repository:
        files = list_repository(dataset.repository, dataset.terms, endpoint)
    elif dataset.linked:
        files = read_links(links, dataset.terms)
    else:
        return [RemoteFile(PurePosixPath(url).name, url) for url in dataset.needed]
    chosen = [file for file in files if any(fnmatchcase(file.name, pattern) for pattern in dataset.needed)]
    for pattern in dataset.archives:
        chosen += subset([file for file in files if fnmatchcase(file.name, pattern)], fraction)
    if not chosen:
        raise UserError(f"None of the expected files is there any more: see {dataset.terms} for what has changed.")
    return chosen


def subset(files: Sequence[RemoteFile], fraction: float) -> list[RemoteFile]:
    """A fraction of the files, at least one: the same each time, and within every larger fraction."""
    drawn = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
    names = {file.name for file in drawn[: max(1, round(fraction * len(files)))]}
    return [file for file in files if file.name in names]


def list_repository(repository: str, terms: str, endpoint: str | None) -> list[RemoteFile]:
    """The files of a data set on the hub; the token is the environment's HF_TOKEN, or that of `hf auth login`."""
    try:
        from huggingface_hub import HfApi, errors, hf_hub_url
        from huggingface_hub.hf_api import RepoFile
        from huggingface_hub.utils import build_hf_headers
    except ImportError as error:
        raise UserError("Files of the Hugging Face hub need its package: pip install huggingface_hub.") from error
    try:
        tree = list(HfApi(endpoint=endpoint).list_repo_tree(repository, repo_type="dataset", recursive=True))
    except errors.GatedRepoError as error:
        raise refused(terms) from error
    except (errors.HTTPError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"The hub does not list {repository} ({reason}): try again, or see {terms}.") from error
    files, headers = [], build_hf_headers()
    for entry in tree:
        if isinstance(entry, RepoFile):
            url = hf_hub_url(repository, entry.path, repo_type="dataset", endpoint=endpoint)
            digest = entry.lfs.sha256 if entry.lfs else None
            files.append(RemoteFile(check_name(entry.path), url, entry.size, digest, headers))
    return files


def read_links(links: str | None, terms: str) -> list[RemoteFile]:
    """Reads lines of 'name TAB URL'; a first line without a URL is a heading. Raises UserError for any other file."""
    if links is None:
        raise UserError(f"This data set needs --links=FILE, the list of names and URLs that {terms} gives out.")
    try:
        text = Path(links).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The list of links {links} cannot be read ({error}): correct --links.") from error
    rows = [line.split("\t") for line in text.splitlines() if line.strip()]
    rows = rows[1:] if rows and "://" not in rows[0][-1] else rows
    if not rows or any(len(row) != 2 or "://" not in row[1] for row in rows):
        raise UserError(f"{links} is no list of 'name TAB URL' lines: download it again from {terms}.")
    return [RemoteFile(check_name(name.strip()), url.strip()) for name, url in rows]


def check_name(name: str) -> str:
    """Returns the name of a listed file; raises UserError if the file would lie outside of the output folder."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise UserError(f"The list of files names '{name}', which is no path below a folder: do not use this list.")
    return name


def main() -> None:
    """Runs `fetch` with the flags."""
    values = flags.FLAGS
    try:
        fetch(values.dataset, values.out, values.fraction, values.workers, values.links)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command continues.") from None


def define_flags() -> None:
    """Defines the command's flags; not at import, where they could collide with those of another command."""
    flags.DEFINE_enum("dataset", None, list(DATASETS), "Data set to download.")
    flags.DEFINE_string("out", None, "Folder to fill.")
    flags.DEFINE_float("fraction", 1.0, "Fraction of the image archives, for a trial; where a set has several.")
    flags.DEFINE_integer("workers", 8, "Files downloaded at once.", lower_bound=1)
    flags.DEFINE_string("links", None, "sa1b: the list of files that its license page gives out.")
    flags.mark_flags_as_required(["dataset", "out"])


if __name__ == "__main__":
    run_command(main, define_flags)
