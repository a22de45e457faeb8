"""Converts PyTorch weights that are stored as pickles to safetensors, the only kind that the encoders load.

    python -m micro_dit.encoders.convert_weights open_clip_pytorch_model.bin encoders/dfn5b

Give the folder instead of a file to convert all its weights (T5 XXL comes in two files). The json, txt and model files
beside them, configuration and tokenizer, are copied. No code in a pickle is run.
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
    """Writes a safetensors file for each file of pickled weights, and copies the small files beside them.

    Returns:
        The safetensors files; those of the same names in `out` were replaced.

    Raises:
        UserError: There are no weights in the file or folder, or a file holds other things than tensors.
    """
    source, out = Path(source), Path(out)
    folder = source if source.is_dir() else source.parent
    files = [source] if source.is_file() else sorted(file for file in folder.glob("*") if file.suffix in PICKLES)
    if not source.exists() or not files:
        raise UserError(f"There are no weights to convert at {source}: give a file that ends in {', '.join(PICKLES)}.")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for file in files:
        written.append(out / safetensors_name(file.name))
        count = _convert_file(file, written[-1])
        report(f"{written[-1]}: {count} tensors, {written[-1].stat().st_size / 1e9:.2f} GB")
    for file in sorted(folder.iterdir()):
        if file.suffix not in COPIED:
            continue
        if file.name.endswith(".bin.index.json"):  # which tensor is in which file
            index = json.loads(file.read_text(encoding="utf-8"))
            index["weight_map"] = {name: safetensors_name(old) for name, old in index["weight_map"].items()}
            target = out / safetensors_name(file.name.removesuffix(".index.json"))
            Path(f"{target}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        elif folder.resolve() != out.resolve():
            shutil.copyfile(file, out / file.name)
    return written


def safetensors_name(name: str) -> str:
    """What Hugging Face calls the same weights as safetensors: pytorch_model.bin becomes model.safetensors."""
    stem = Path(name).stem
    return (stem if stem.startswith("diffusion_") else stem.replace("pytorch_model", "model")) + ".safetensors"


def _convert_file(file: Path, target: Path) -> int:
    """Converts one file; returns the number of its tensors."""
    import pickle

    import torch
    from safetensors.torch import save_file

    try:
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{file} is no file of PyTorch weights, or holds other things ({reason}).") from error
    while isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    tensors: dict[str, Any] = {}
    seen = set()
    for name, value in loaded.items() if isinstance(loaded, dict) else ():
        if isinstance(value, torch.Tensor):
            # safetensors has no views: tensors that share memory are stored one by one.
            storage = value.untyped_storage().data_ptr()
            tensors[str(name)] = value.clone().contiguous() if storage in seen else value.contiguous()
            seen.add(storage)
    if not tensors:
        raise UserError(f"{file} holds no tensors by name: give a file of weights.")
    with replacing(target) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    return len(tensors)


def main(argv: Sequence[str]) -> None:
    """Runs `convert_weights` with the two arguments."""
    if len(argv) != 3:
        raise UserError("give two arguments: the weights (a file or a folder) and the folder to write.")
    convert_weights(argv[1], argv[2])


if __name__ == "__main__":
    run_command(main, takes_arguments=True)
