"""Converts PyTorch weights stored as pickles to safetensors, the only format that the encoders load.

    python -m micro_dit.encoders.convert_weights open_clip_pytorch_model.bin encoders/dfn5b

Pass a folder instead of a file to convert all weights in it (T5 XXL has two files). The configuration and tokenizer
(.json, .txt and .model files in the same folder) are copied. No code in a pickle is executed.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from micro_dit.cli import run_command
from micro_dit.errors import UserError
from micro_dit.files import replacing

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
COPIED = (".json", ".txt", ".model")


def convert_weights(source: str | Path, out: str | Path, report: Callable[[str], None] = print) -> list[Path]:
    """Writes a safetensors file for each file of pickled weights, and copies the configuration and tokenizer.

    Args:
        source: File of weights, or a folder with such files.
        out: Folder to write; files of the same names are replaced.
        report: Called with a line for each file written.

    Returns:
        The paths of the safetensors files.

    Raises:
        UserError: There are no weights at `source`, or a file contains objects other than tensors.
    """
    source, out = Path(source), Path(out)
    folder = source if source.is_dir() else source.parent
    files = [source] if source.is_file() else sorted(file for file in folder.glob("*") if file.suffix in PICKLES)
    if not source.exists() or not files:
        raise UserError(
            f"There are no weights to convert at {source}. Pass a {', '.join(PICKLES)} file, or a folder of such files."
        )
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for file in files:
        written.append(out / safetensors_name(file.name))
        count = _convert_file(file, written[-1])
        report(f"{written[-1]}: {count} tensors, {written[-1].stat().st_size / 1e9:.2f} GB")
    for file in sorted(folder.iterdir()):
        if file.suffix not in COPIED:
            continue
        if file.name.endswith(".bin.index.json"):  # maps each tensor to its file
            index = json.loads(file.read_text(encoding="utf-8"))
            index["weight_map"] = {name: safetensors_name(old) for name, old in index["weight_map"].items()}
            target = out / safetensors_name(file.name.removesuffix(".index.json"))
            Path(f"{target}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        elif folder.resolve() != out.resolve():
            shutil.copyfile(file, out / file.name)
    return written


def safetensors_name(name: str) -> str:
    """Returns Hugging Face's name for the same weights as safetensors: pytorch_model.bin → model.safetensors."""
    stem = Path(name).stem
    return (stem if stem.startswith("diffusion_") else stem.replace("pytorch_model", "model")) + ".safetensors"


def _convert_file(file: Path, target: Path) -> int:
    """Converts one file and returns its number of tensors."""
    import pickle

    import torch
    from safetensors.torch import save_file

    try:
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{file} is not a file of PyTorch weights, or contains objects other than tensors ({reason}). Download it "
            "again, or save its state dict."
        ) from error
    while isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    tensors: dict[str, Any] = {}
    seen = set()
    for name, value in loaded.items() if isinstance(loaded, dict) else ():
        if isinstance(value, torch.Tensor):
            # safetensors cannot store views, so tensors that share memory are copied.
            storage = value.untyped_storage().data_ptr()
            tensors[str(name)] = value.clone().contiguous() if storage in seen else value.contiguous()
            seen.add(storage)
    if not tensors:
        raise UserError(f"{file} contains no named tensors. Pass a file of weights.")
    with replacing(target) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    return len(tensors)


def main(argv: Sequence[str]) -> None:
    """Runs `convert_weights` with the two command-line arguments."""
    if len(argv) != 3:
        raise UserError("Pass two arguments: the weights (a file or a folder) and the folder to write.")
    convert_weights(argv[1], argv[2])


if __name__ == "__main__":
    run_command(main, takes_arguments=True)
