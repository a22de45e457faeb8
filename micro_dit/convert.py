"""Converts weights of the public PyTorch release to a model folder, and models back to PyTorch, without loss.

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

# The release's encoders: autoencoder by latent channels; text encoder and number of tokens by caption channels.
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
        path: File with the state dict.
        out: Folder to write.
        config: Configuration of the network; by default inferred from the weights.
        vae: Name of the autoencoder; by default the release's for this number of latent channels.
        text_encoder: Name of the text encoder; by default the release's for this number of caption channels.
        caption_tokens: Number of caption tokens; by default the release's.
        caption_cleaning: How prompts are cleaned; the release does not clean them.
        sigma_data: Standard deviation of the training latents.

    Raises:
        UserError: The file contains anything other than the network's float tensors, or an encoder is not known.
    """
    state_dict = without_wrappers(read_tensors(path))
    size, config = ("configuration from --model", config) if config is not None else recognize(state_dict)
    params = from_state_dict(state_dict, config)
    vae = vae or VAES.get(config.in_channels)
    if vae is None:
        raise UserError(f"No autoencoder with {config.in_channels} latent channels is known. Set --vae to its name.")
    if vae in VAES.values() and VAES.get(config.in_channels) != vae:
        raise UserError(
            f"--vae={vae} does not have the network's {config.in_channels} latent channels. Set --vae to the "
            "autoencoder of the training."
        )
    known_encoder, known_tokens = TEXT_ENCODERS.get(config.caption_channels, (None, None))
    if text_encoder not in (None, known_encoder):
        known_tokens = None
    text_encoder, caption_tokens = text_encoder or known_encoder, caption_tokens or known_tokens
    if text_encoder is None or caption_tokens is None:
        raise UserError(
            f"The text encoder with {config.caption_channels} channels or its number of caption tokens is not known. "
            "Set --text_encoder and --caption_tokens."
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
    print(f"latents {side} × {side} × {config.in_channels} from {vae}; position scale {scale}")
    print(f"captions {caption_tokens} × {config.caption_channels} from {text_encoder}")
    print(f"wrote {out}")


def to_torch(workdir: str | Path, out: str | Path, step: int | None = None) -> None:
    """Writes a float32 state dict with the release's names to a `.safetensors`, `.pt` or `.pth` file.

    Args:
        workdir: Model folder, or work directory of a run, whose EMA weights are used if there are any.
        out: File to write.
        step: Checkpoint of the run; by default the newest.

    Raises:
        UserError: The model or checkpoint does not exist, or the file name has another suffix.
    """
    from micro_dit.training.pretrained import read_model

    out = Path(out)
    if out.suffix not in TORCH_SUFFIXES:
        raise UserError(f"--to_torch={out} must end in {' or '.join(TORCH_SUFFIXES)}. Change the file name.")
    params, config, about = read_model(workdir, step)
    of_run = not is_model_folder(workdir)
    what = f"{Path(workdir).name}, step {about['step']}" if of_run else about["source"]
    state_dict = to_state_dict(params, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_space(out, state_dict)
    (write_safetensors if out.suffix == ".safetensors" else write_torch)(out, state_dict)
    print(f"{out}: {len(state_dict)} tensors, {sum(value.size for value in params.values()):,} parameters from {what}")


def _check_space(out: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises UserError if the disk is too small; PyTorch's own error comes late and does not name the file."""
    needed = 4 * sum(value.size for value in arrays.values()) + (1 << 20)
    existing = next(folder for folder in (Path(out).absolute(), *Path(out).absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{out} requires {needed / 1e9:.2f} GB, but the disk has only {free / 1e9:.2f} GB free. Free disk space or "
            "choose another disk."
        )


def main() -> None:
    """Converts in the direction selected by the flags."""
    if (FLAGS.from_torch is None) == (FLAGS.to_torch is None):
        raise UserError("Set either --from_torch=FILE and --out=FOLDER, or --to_torch=FILE and --workdir=FOLDER.")
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
        raise UserError(f"--{way} requires --{needed}=FOLDER.")
    if given := [f"--{name}" for name in refused if getattr(FLAGS, name) is not None]:
        raise UserError(f"{', '.join(given)} cannot be combined with --{way}. Remove one of the two.")


FLAGS = flags.FLAGS
ENCODERS = ("vae", "text_encoder", "caption_tokens", "caption_cleaning", "sigma_data")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("from_torch", None, "Weights of the release (.pt or .safetensors) to convert to a folder.")
    flags.DEFINE_string("out", None, "With --from_torch: model folder to write.")
    flags.DEFINE_string("model", None, "config.json with the network's configuration; by default it is inferred.")
    flags.DEFINE_string("vae", None, "Image encoder of the model; default: the release's for its channels.")
    flags.DEFINE_string("text_encoder", None, "Text encoder of the model; default: the release's for its channels.")
    flags.DEFINE_integer("caption_tokens", None, "Number of caption tokens; default: the release's 77.", lower_bound=1)
    flags.DEFINE_enum("caption_cleaning", None, ["none", "deepfloyd-2"], "How prompts are cleaned; default: none.")
    flags.DEFINE_float("sigma_data", None, "Standard deviation of the training latents; default: 0.9.")
    flags.DEFINE_string("to_torch", None, "File (.pt, .pth or .safetensors) to write, with the release's names.")
    flags.DEFINE_string("workdir", None, "With --to_torch: model folder, or work directory of a run, to convert.")
    flags.DEFINE_integer("step", None, "With --to_torch: checkpoint of the run; by default the newest.")


if __name__ == "__main__":
    run_command(main, define_flags)
