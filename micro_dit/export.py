"""Exports a trained model as a folder in the hub's layout: `python -m micro_dit.export --workdir=… --out=…`.

See docs/export.md and micro_dit/interop/model_folder.py.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from micro_dit.cli import run_command
from micro_dit.diffusion.samplers import SAMPLERS
from micro_dit.encoders.hub import ASSETS, HUB_NAME
from micro_dit.errors import UserError
from micro_dit.interop.model_folder import ABOUT, DTYPES, OPTIONAL, VAE, WEIGHTS_FILE, save_model_folder

if TYPE_CHECKING:
    from micro_dit.api import About, Model
    from micro_dit.diffusion.generate import Sampling
    from micro_dit.interop.model_card import TrainingSummary

CARD, PICTURE, PROGRAMS = "README.md", "samples.png", "stablehlo"
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
LICENSES = {"CC BY-SA 4.0": "cc-by-sa-4.0", "CC BY 4.0": "cc-by-4.0", "CC0": "cc0-1.0"}  # in attributions: on the hub


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """Contents of an exported model folder.

    Raises:
        UserError: The weights can't be written in this dtype.
    """

    dtype: str = "float32"  # of the weights' file, one of DTYPES
    vae: str | None = None  # in place of the name in training: a folder, which is copied, or a repository on the hub
    text_encoder: str | None = None  # in place of the name in training; it is only named
    license: str | None = None  # an identifier of the hub; by default that of the data's attribution
    stablehlo: bool = False  # whether to write the denoiser, and the decoder if it is in the folder, as programs
    sampler: str = "heun"  # default in the programs' signature, one of SAMPLERS
    steps: int | None = None  # noise levels in the programs' signature; by default the model's

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"weights can't be written as {self.dtype!r}; choose {', '.join(DTYPES)}.")


def export(
    workdir: str | Path, out: str | Path, settings: ExportSettings = ExportSettings(), *, step: int | None = None,
    params: str | None = None, report: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Exports a run as a model folder; all of it, or nothing.

    Args:
        workdir: Work directory of a run, or a model folder.
        out: New folder.
        settings: Contents of the folder.
        step: Checkpoint of the run; by default the newest.
        params: 'ema' or 'raw'; by default the EMA weights where there are some.
        report: Called with lines that describe what was written.

    Raises:
        UserError: The model does not exist, `out` is not empty, the encoder is not that of the training, or a
            setting makes no sense.
    """
    from micro_dit.api import load
    from micro_dit.diffusion.generate import Sampling
    from micro_dit.interop.model_card import model_card
    from micro_dit.training.pretrained import read_run

    workdir, out = Path(workdir), Path(out).resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there and not empty: give a new folder.")
    model = load(workdir, step, params=params)
    steps = model.about.steps if settings.steps is None else settings.steps
    sampling = Sampling(steps, model.about.guidance, settings.sampler)
    model.about, vae_files = _with_encoders(model.about, settings.vae, settings.text_encoder)
    run = read_run(workdir)
    recipe = _recipe(run["config"], workdir, model.about.step, params) if run else None
    pixels = recipe.phase["resolution"] if recipe else None
    if vae_files:  # reading the encoder checks that it is the one of the training
        pixels = model.image_encoder.downsample * model.config.input_size
    named = (known for words, known in LICENSES.items() if words in model.about.source)
    license, told = settings.license or next(named, "unknown"), _told(model.about)
    with _new_folder(out) as folder:
        params_on_host = {name: np.asarray(value) for name, value in model.params.items()}
        save_model_folder(folder, params_on_host, model.config, told, settings.dtype, vae_files)
        picture = _picture(workdir, model.about.step if run else None, params)
        if picture is not None:
            shutil.copyfile(picture, folder / PICTURE)
        if settings.stablehlo:
            _write_programs(folder, model, settings.dtype, sampling, bool(vae_files))
        card = model_card(
            out.name, parameters=_count(model), pixels=pixels, dtype=settings.dtype, license=license, about=told,
            vae_included=bool(vae_files), recipe=recipe, picture=PICTURE if picture else "",
            programs=settings.stablehlo,
        )  # fmt: skip
        (folder / CARD).write_text(card, encoding="utf-8")
    for line in _summary(workdir, out, model, settings.dtype, bool(vae_files), license):
        report(line)


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder that becomes `out` at the end, and is removed on an error."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} can't be made ({error.strerror}): give another folder.") from error
    try:
        yield partial
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _summary(workdir: Path, out: Path, model: "Model", dtype: str, vae_included: bool, license: str) -> Iterator[str]:
    """Yields lines that describe an exported folder."""
    about = model.about
    where = f"step {about.step} of {workdir.name}" if about.step is not None else workdir.name
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    yield f"{out}: {where}, {_count(model):,} parameters as {dtype}, {size / 1e6:.1f} MB in all"
    yield f"image encoder: {about.vae}, {f'copied to {out / VAE}' if vae_included else 'found by that name on the hub'}"
    if Path(about.text_encoder).expanduser().is_dir():
        yield (
            f"warning: the text encoder {about.text_encoder} is a folder here, and not copied: where the hub has it, "
            "name it by --text_encoder=owner/repository."
        )
    unstated = "; give --license before you share it" if license == "unknown" else ""
    yield f"license in {out / CARD}: {license}{unstated}"


def _count(model: "Model") -> int:
    return sum(value.size for value in model.params.values())


def _with_encoders(about: "About", vae: str | None, text_encoder: str | None) -> tuple["About", Path | None]:
    """Returns the description with other encoders, and the folder of the image encoder unless it is on the hub."""
    files = _vae_files(about.vae_folder if about.vae_folder and vae is None else vae or about.vae)
    name = vae or about.vae
    if files is not None and Path(name).expanduser().is_dir():
        name = Path(name).expanduser().resolve().name  # a path of this machine means nothing elsewhere
    text_encoder, folder = text_encoder or about.text_encoder, str(files or "")
    return dataclasses.replace(about, vae=name, text_encoder=text_encoder, vae_folder=folder), files


def _vae_files(name: str) -> Path | None:
    """Returns the folder of an autoencoder that is here or comes with the package; None if it is on the hub."""
    for folder in (Path(name).expanduser(), ASSETS / name):
        if folder.is_dir():
            return folder / VAE if (folder / VAE / "config.json").is_file() else folder
    if HUB_NAME.fullmatch(name):
        return None
    raise UserError(f"the image encoder {name!r} is no folder, nor a repository's name on the hub: give it as --vae.")


def _told(about: "About") -> dict[str, Any]:
    """Returns the fields of the folder's config.json that describe the model."""
    optional = {name: getattr(about, name, None) for name in OPTIONAL}
    told = {name: value for name, value in optional.items() if value not in (None, "")}
    return {name: getattr(about, name) for name in ABOUT} | told


def _recipe(config: Mapping[str, Any], workdir: Path, step: int | None, params: str | None) -> "TrainingSummary":
    """Returns how the model of a run was trained, from its config and metrics."""
    from micro_dit.interop.model_card import TrainingSummary
    from micro_dit.training.metrics import read_metrics

    assert step is not None
    data, started_from = config["data"].get("source", ""), config.get("init_from", "")
    recipe = TrainingSummary(config["phases"], step, averaged=False, data=data, started_from=started_from)
    recipe = dataclasses.replace(recipe, averaged=params != "raw" and recipe.phase.get("ema_decay", 0) > 0)
    metrics = workdir / "metrics.jsonl"
    name = "heldout_loss_ema" if recipe.averaged else "heldout_loss"
    records = read_metrics(metrics) if metrics.is_file() else []
    measured = [record for record in records if name in record and record["step"] <= step]
    if not measured:
        return recipe
    return dataclasses.replace(recipe, heldout_loss=measured[-1][name], heldout_step=int(measured[-1]["step"]))


def _picture(workdir: Path, step: int | None, params: str | None) -> Path | None:
    """Returns the file with samples of a checkpoint, or of the model folder that is exported again."""
    if params == "raw":
        return None  # the grids were sampled with the EMA weights
    picture = workdir / (PICTURE if step is None else f"samples/step_{step:08d}.png")
    return picture if picture.is_file() else None


def _write_programs(folder: Path, model: "Model", dtype: str, sampling: "Sampling", with_decoder: bool) -> None:
    from safetensors.numpy import load_file

    from micro_dit.interop.stablehlo import write_programs

    decoder = (load_file(folder / VAE / VAE_WEIGHTS), model.image_encoder.config) if with_decoder else None
    write_programs(
        folder / PROGRAMS, model.config, dtype, caption_tokens=model.about.caption_tokens,
        sigma_data=model.about.sigma_data, sampling=sampling,
        weights=f"../{WEIGHTS_FILE}", decoder=decoder, decoder_weights=f"../{VAE}/{VAE_WEIGHTS}",
    )  # fmt: skip


def main() -> None:
    """Exports the model that the flags name."""
    if not FLAGS.stablehlo and (FLAGS.sampler is not None or FLAGS.steps is not None):
        raise UserError("--sampler and --steps are those of the program: give --stablehlo too, or leave them out.")
    settings = ExportSettings(
        FLAGS.dtype, FLAGS.vae, FLAGS.text_encoder, FLAGS.license, FLAGS.stablehlo, FLAGS.sampler or "heun", FLAGS.steps
    )
    export(FLAGS.workdir, FLAGS.out, settings, step=FLAGS.step, params=FLAGS.params)


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Work directory of a run, or a model folder.", required=True)
    flags.DEFINE_string("out", None, "The model folder to make.", required=True)
    flags.DEFINE_integer("step", None, "Checkpoint of the run to use; by default the newest.")
    flags.DEFINE_enum("params", None, ["ema", "raw"], "Moving average or not; by default the average if there is one.")
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Of the weights in the folder.")
    flags.DEFINE_string("vae", None, "The image encoder: a folder, which is copied in, or a repository on the hub.")
    flags.DEFINE_string("text_encoder", None, "The text encoder's name, where the one of the run means nothing.")
    flags.DEFINE_string("license", None, "Of the weights, as the hub names it; by default that of the attribution.")
    flags.DEFINE_boolean("stablehlo", False, "Also write the denoiser as a program that needs no micro_dit.")
    flags.DEFINE_enum("sampler", None, list(SAMPLERS), "Default in the signature; by default heun.")
    flags.DEFINE_integer("steps", None, "Of the noise levels in the signature; by default the model's.")


if __name__ == "__main__":
    run_command(main, define_flags)
