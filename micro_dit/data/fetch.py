"""Downloads the public data sets in parallel. Run the same command again to resume an interrupted download.

    python -m micro_dit.data.fetch --dataset=cc12m --out=raw/cc12m --fraction=0.01

Files are stored as published; `micro_dit.precompute` reads them directly. `docs/data.md` describes each data set.
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
    """The location of a public data set."""

    terms: str  # page with the license and, if necessary, the form to request access
    repository: str | None = None  # on the Hugging Face Hub
    needed: tuple[str, ...] = ()  # files needed for any fraction: patterns in a repository, otherwise URLs
    archives: tuple[str, ...] = ()  # patterns of image archives; the fraction applies to each pattern separately
    linked: bool = False  # whether the files are listed in a file of links from the terms page


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
    """Downloads the files of a data set that are not in the output folder yet.

    Args:
        dataset: A name in `DATASETS`.
        out: Output folder.
        fraction: Fraction of the image archives; a larger fraction includes the files of a smaller one.
        workers: Number of files downloaded at once.
        links: File with names and URLs, for data sets that are published as a list of links.
        endpoint: URL of the Hugging Face Hub; by default HF_ENDPOINT from the environment, or the public hub.
        report: Called with each line of progress.

    Returns:
        The names of all selected files.

    Raises:
        UserError: An argument is invalid, access is refused, or some files could not be downloaded.
    """
    if dataset not in DATASETS:
        raise UserError(f"Unknown data set '{dataset}'. Set --dataset to one of {', '.join(DATASETS)}.")
    if not 0 < fraction <= 1 or workers < 1:
        raise UserError(
            f"--fraction must be greater than 0 and at most 1, and --workers at least 1, not {fraction} and {workers}."
        )
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
    """Lists the files of a data set, required files first; raises UserError if they cannot be listed."""
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
        raise UserError(f"The expected files are no longer published. Check {dataset.terms} for changes.")
    return chosen


def subset(files: Sequence[RemoteFile], fraction: float) -> list[RemoteFile]:
    """Returns a deterministic fraction of the files, at least one; larger fractions include smaller ones."""
    shuffled = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
    names = {file.name for file in shuffled[: max(1, round(fraction * len(files)))]}
    return [file for file in files if file.name in names]


def list_repository(repository: str, terms: str, endpoint: str | None) -> list[RemoteFile]:
    """Lists a data set on the Hugging Face Hub, with the token from HF_TOKEN or `hf auth login`."""
    try:
        from huggingface_hub import HfApi, errors, hf_hub_url
        from huggingface_hub.hf_api import RepoFile
        from huggingface_hub.utils import build_hf_headers
    except ImportError as error:
        raise UserError(
            "Downloads from the Hugging Face Hub require the package huggingface_hub. Run pip install huggingface_hub."
        ) from error
    try:
        tree = list(HfApi(endpoint=endpoint).list_repo_tree(repository, repo_type="dataset", recursive=True))
    except errors.GatedRepoError as error:
        raise refused(terms) from error
    except (errors.HTTPError, OSError) as error:
        reason = first_line(error)
        raise UserError(
            f"Cannot list {repository} on the Hugging Face Hub ({reason}). Try again later, or check {terms}."
        ) from error
    files, headers = [], build_hf_headers()
    for entry in tree:
        if isinstance(entry, RepoFile):
            url = hf_hub_url(repository, entry.path, repo_type="dataset", endpoint=endpoint)
            digest = entry.lfs.sha256 if entry.lfs else None
            files.append(RemoteFile(check_name(entry.path), url, entry.size, digest, headers))
    return files


def read_links(links: str | None, terms: str) -> list[RemoteFile]:
    """Reads a file of 'name TAB URL' lines with an optional heading; raises UserError for any other format."""
    if links is None:
        raise UserError(
            f"This data set requires --links=FILE, where FILE is the list of names and URLs available at {terms}."
        )
    try:
        text = Path(links).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the list of links {links} ({error}). Correct --links.") from error
    rows = [line.split("\t") for line in text.splitlines() if line.strip()]
    rows = rows[1:] if rows and "://" not in rows[0][-1] else rows
    if not rows or any(len(row) != 2 or "://" not in row[1] for row in rows):
        raise UserError(f"{links} does not consist of 'name TAB URL' lines. Download the list again from {terms}.")
    return [RemoteFile(check_name(name.strip()), url.strip()) for name, url in rows]


def check_name(name: str) -> str:
    """Returns the name of a listed file; raises UserError if it would be written outside the output folder."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise UserError(f"The list of files contains the unsafe path '{name}'. Get the list from its official source.")
    return name


def main() -> None:
    """Runs `fetch` with the values of the flags."""
    values = flags.FLAGS
    try:
        fetch(values.dataset, values.out, values.fraction, values.workers, values.links)
    except KeyboardInterrupt:
        raise UserError("Interrupted. Run the same command again to resume.") from None


def define_flags() -> None:
    """Defines the command's flags. Not done at import time, because other commands define flags of the same names."""
    flags.DEFINE_enum("dataset", None, list(DATASETS), "Data set to download.")
    flags.DEFINE_string("out", None, "Output folder.")
    flags.DEFINE_float("fraction", 1.0, "Fraction of the image archives to download, for data sets with several.")
    flags.DEFINE_integer("workers", 8, "Number of files downloaded at once.", lower_bound=1)
    flags.DEFINE_string("links", None, "File with the list of links from the license page. Required for sa1b.")
    flags.mark_flags_as_required(["dataset", "out"])


if __name__ == "__main__":
    run_command(main, define_flags)
