"""Converts weights of the public PyTorch release to a model folder, and back to PyTorch, bit for bit.

python -m micro_dit.convert --from_torch=dit_4_channel_37M_real_and_synthetic_data.pt --out=models/microdit
python -m micro_dit.convert --to_torch=microdit.pt --workdir=models/microdit
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from micro_dit.cli import run_command
from micro_dit.diffusion.edm import SIGMA_DATA
from micro_dit.errors import UserError
from micro_dit.interop.model_folder import config_from, is_model_folder, read_config, save_model_folder
from micro_dit.interop.tensor_files import read_tensors, write_safetensors, write_torch
from micro_dit.interop.torch_checkpoint import from_state_dict, recognize, to_state_dict, without_wrappers
from micro_dit.models.config import DiTConfig

# What the release was trained with: the autoencoder by its channels, the text encoder and its tokens by its channels.
VAES = {4: "stabilityai/stable-diffusion-xl-base-1.0", 16: "ostris/vae-kl-f8-d16"}
TEXT_ENCODERS = {1024: ("apple/DFN5B-CLIP-ViT-H-14-378", 77)}
TORCH_SUFFIXES = (".pt", ".pth", ".safetensors")


def from_torch(
    path: str | Path, out: str | Path, *, config: DiTConfig | None = None, vae: str | None = None,
    text_encoder: str | None = None, caption_tokens: int | None = None, caption_cleaning: str = "none",
    sigma_data: float = SIGMA_DATA,
) -> None:  # fmt: skip
    """Converts a `.pt` or `.safetensors` state dict with the release's names to the model folder `out`.

    Args:
        path: The state dict.
        out: The folder.
        config: Config of the network; by default it is recognized.
        vae: The autoencoder that made the latents; by default the release's for that number of channels.
        text_encoder: The text encoder; by default the release's for that number of channels.
        caption_tokens: Tokens that captions are padded to; by default the release's.
        caption_cleaning: How prompts are cleaned; the release doesn't.
        sigma_data: Standard deviation of the latents that the network was trained with.

    Raises:
        UserError: The file holds other things than float tensors, or the wrong ones; encoders are not known.
    """
    state_dict = without_wrappers(read_tensors(path))
    size, config = ("network as given", config) if config is not None else recognize(state_dict)
    params = from_state_dict(state_dict, config)
    vae = vae or VAES.get(config.in_channels)
    if vae is None:
        raise UserError(f"which autoencoder has {config.in_channels} latent channels is not known: give its --vae.")
    if vae in VAES.values() and VAES.get(config.in_channels) != vae:
        raise UserError(f"{vae} has another number of latent channels than this network's {config.in_channels}.")
    known_encoder, known_tokens = TEXT_ENCODERS.get(config.caption_channels, (None, None))
    if text_encoder not in (None, known_encoder):
        known_tokens = None
    text_encoder, caption_tokens = text_encoder or known_encoder, caption_tokens or known_tokens
    if text_encoder is None or caption_tokens is None:
        raise UserError(
            f"the text encoder of {config.caption_channels} channels, or how many tokens it pads captions to, is not "
            "known: give --text_encoder and --caption_tokens."
        )
    dtypes = sorted({str(value.dtype) for value in params.values()})
    widened = "" if dtypes == ["float32"] else ", widened to float32"
    about = {
        "sigma_data": sigma_data, "vae": vae, "text_encoder": text_encoder, "caption_tokens": caption_tokens,
        "caption_cleaning": caption_cleaning, "source": f"{Path(path).name}, {' and '.join(dtypes)}{widened}",
    }  # fmt: skip
    _check_space(out, params)
    save_model_folder(out, params, config, about)
    side, scale = config.input_size, config.pos_interp_scale
    print(f"{size}: {sum(value.size for value in params.values()):,} parameters, {' and '.join(dtypes)}{widened}")
    print(f"latents {side} × {side} × {config.in_channels} of {vae}; position scale {scale}")
    print(f"captions {caption_tokens} × {config.caption_channels} of {text_encoder}")
    print(f"written to {out}")


def to_torch(workdir: str | Path, out: str | Path, step: int | None = None) -> None:
    """Writes a state dict with the release's names, float32, to a `.safetensors`, `.pt` or `.pth` file.

    Args:
        workdir: Model folder, or work directory of a run, whose EMA weights are taken if there are any.
        out: The file.
        step: Checkpoint of the run; by default the newest.

    Raises:
        UserError: The model or checkpoint does not exist, or the file's name has another ending.
    """
    from micro_dit.training.pretrained import read_model

    out = Path(out)
    if out.suffix not in TORCH_SUFFIXES:
        raise UserError(f"the name {out.name} should end in {' or '.join(TORCH_SUFFIXES)}, to tell the format.")
    params, config, about = read_model(workdir, step)
    of_run = not is_model_folder(workdir)
    what = f"{Path(workdir).name}, step {about['step']}" if of_run else about["source"]
    state_dict = to_state_dict(params, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_space(out, state_dict)
    (write_safetensors if out.suffix == ".safetensors" else write_torch)(out, state_dict)
    print(f"{out}: {len(state_dict)} tensors, {sum(value.size for value in params.values()):,} parameters of {what}")


def _check_space(out: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """PyTorch's own message about a full disk doesn't name it, and comes late."""
    needed = 4 * sum(value.size for value in arrays.values()) + (1 << 20)
    existing = next(folder for folder in (Path(out).absolute(), *Path(out).absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(f"{out} needs {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB free; make room.")


def main() -> None:
    """Converts in the direction that the flags ask for."""
    if (FLAGS.from_torch is None) == (FLAGS.to_torch is None):
        raise UserError("give either --from_torch=FILE and --out=FOLDER, or --to_torch=FILE and --workdir=FOLDER.")
    if FLAGS.to_torch is not None:
        _check_flags("to_torch", "workdir", refused=("out", "model", *ENCODERS))
        to_torch(FLAGS.workdir, FLAGS.to_torch, FLAGS.step)
        return
    _check_flags("from_torch", "out", refused=("workdir", "step"))
    config = config_from(read_config(FLAGS.model).get("model"), FLAGS.model) if FLAGS.model else None
    given: dict[str, Any] = {name: getattr(FLAGS, name) for name in ENCODERS if getattr(FLAGS, name) is not None}
    from_torch(FLAGS.from_torch, FLAGS.out, config=config, **given)


def _check_flags(way: str, needed: str, refused: Sequence[str]) -> None:
    if not getattr(FLAGS, needed):
        raise UserError(f"--{way} needs --{needed}=FOLDER.")
    if given := [f"--{name}" for name in refused if getattr(FLAGS, name) is not None]:
        raise UserError(f"{', '.join(given)} means nothing with --{way}: leave it out.")


FLAGS = flags.FLAGS
ENCODERS = ("vae", "text_encoder", "caption_tokens", "caption_cleaning", "sigma_data")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("from_torch", None, "Weights of the release, .pt or .safetensors, to make a model folder of.")
    flags.DEFINE_string("out", None, "The model folder to make.")
    flags.DEFINE_string("model", None, "A config.json with the network's fields; by default they are recognized.")
    flags.DEFINE_string("vae", None, "Image encoder of the model; by default the release's for its channels.")
    flags.DEFINE_string("text_encoder", None, "Text encoder of the model; by default the release's for its channels.")
    flags.DEFINE_integer("caption_tokens", None, "Tokens of a caption; by default the release's 77.", lower_bound=1)
    flags.DEFINE_enum("caption_cleaning", None, ["none", "deepfloyd-2"], "What is done to a prompt; default: none.")
    flags.DEFINE_float("sigma_data", None, "Standard deviation of the latents in training; default: 0.9.")
    flags.DEFINE_string("to_torch", None, "The .pt or .safetensors file to write, with the release's names.")
    flags.DEFINE_string("workdir", None, "Model folder, or work directory of a run, to write it from.")
    flags.DEFINE_integer("step", None, "Checkpoint of the run to use; by default the newest.")


if __name__ == "__main__":
    run_command(main, define_flags)
