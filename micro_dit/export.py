"""Exports a trained model as a folder for the Hugging Face Hub: `python -m micro_dit.export --workdir=… --out=…`.

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

CARD, SAMPLES, PROGRAMS = "README.md", "samples.png", "stablehlo"
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
# The Hub's identifiers of licenses named in attributions.
LICENSES = {"CC BY-SA 4.0": "cc-by-sa-4.0", "CC BY 4.0": "cc-by-4.0", "CC0": "cc0-1.0"}


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """The contents of an exported model folder.

    Raises:
        UserError: `dtype` is not supported.
    """

    dtype: str = "float32"  # dtype of the weights file, one of DTYPES
    vae: str | None = None  # replaces the name in training: a folder, which is copied, or a repository on the Hub
    text_encoder: str | None = None  # replaces the name in training; the text encoder is never copied
    license: str | None = None  # the Hub's license identifier; by default taken from the data's attribution
    stablehlo: bool = False  # whether to write the denoiser, and the decoder if it is in the folder, as programs
    sampler: str = "heun"  # default sampler in the programs' signature, one of SAMPLERS
    steps: int | None = None  # number of sampler steps in the programs' signature; by default the model's

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"Weights cannot be written as {self.dtype!r}. Set --dtype to one of {', '.join(DTYPES)}.")


def export(
    workdir: str | Path, out: str | Path, settings: ExportSettings = ExportSettings(), *, step: int | None = None,
    params: str | None = None, report: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Exports a run as a model folder; on an error, nothing is written.

    Args:
        workdir: Work directory of a run, or a model folder.
        out: Folder to create; it must not exist, or be empty.
        settings: Contents of the folder.
        step: Checkpoint of the run; by default the newest.
        params: 'ema' or 'raw'; by default the EMA weights if there are any.
        report: Called with each line of the summary.

    Raises:
        UserError: The model does not exist, `out` is not empty, the image encoder is not the one of the training, or a
            setting is invalid.
    """
    from micro_dit.api import load
    from micro_dit.diffusion.generate import Sampling
    from micro_dit.interop.model_card import model_card
    from micro_dit.training.pretrained import read_run

    workdir, out = Path(workdir), Path(out).resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} already exists and is not an empty folder. Set --out to a new folder.")
    model = load(workdir, step, params=params)
    steps = model.about.steps if settings.steps is None else settings.steps
    sampling = Sampling(steps, model.about.guidance, settings.sampler)
    model.about, vae_files = _with_encoders(model.about, settings.vae, settings.text_encoder)
    run = read_run(workdir)
    recipe = _recipe(run["config"], workdir, model.about.step, params) if run else None
    pixels = recipe.phase["resolution"] if recipe else None
    if vae_files:  # loading the encoder also checks that it is the one of the training
        pixels = model.image_encoder.downsample * model.config.input_size
    named = (known for words, known in LICENSES.items() if words in model.about.source)
    license, about = settings.license or next(named, "unknown"), _describe(model.about)
    with _new_folder(out) as folder:
        params_on_host = {name: np.asarray(value) for name, value in model.params.items()}
        save_model_folder(folder, params_on_host, model.config, about, settings.dtype, vae_files)
        samples = _find_samples(workdir, model.about.step if run else None, params)
        if samples is not None:
            shutil.copyfile(samples, folder / SAMPLES)
        if settings.stablehlo:
            _write_programs(folder, model, settings.dtype, sampling, bool(vae_files))
        card = model_card(
            out.name, parameters=_count(model), pixels=pixels, dtype=settings.dtype, license=license, about=about,
            vae_included=bool(vae_files), recipe=recipe, samples=SAMPLES if samples else "",
            programs=settings.stablehlo,
        )  # fmt: skip
        (folder / CARD).write_text(card, encoding="utf-8")
    for line in _summary(workdir, out, model, settings.dtype, bool(vae_files), license):
        report(line)


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `out` at the end, or removed on an error."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left behind if an export was killed
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"Cannot create {out} ({error.strerror}). Set --out to another folder.") from error
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
    yield f"{out}: {where}, {_count(model):,} parameters as {dtype}, {size / 1e6:.1f} MB in total"
    yield f"image encoder: {about.vae}, {f'copied to {out / VAE}' if vae_included else 'on the Hub, not copied'}"
    if Path(about.text_encoder).expanduser().is_dir():
        yield (
            f"warning: the text encoder {about.text_encoder} is a local folder, which is not copied. If it is on the "
            "Hugging Face Hub, set --text_encoder=owner/repository."
        )
    unstated = "; set --license before you share the folder" if license == "unknown" else ""
    yield f"license in {out / CARD}: {license}{unstated}"


def _count(model: "Model") -> int:
    return sum(value.size for value in model.params.values())


def _with_encoders(about: "About", vae: str | None, text_encoder: str | None) -> tuple["About", Path | None]:
    """Returns the description with the encoders replaced, and the image encoder's folder, or None if on the Hub."""
    files = _vae_files(about.vae_folder if about.vae_folder and vae is None else vae or about.vae)
    name = vae or about.vae
    if files is not None and Path(name).expanduser().is_dir():
        name = Path(name).expanduser().resolve().name  # a local path is not valid on other machines
    text_encoder, folder = text_encoder or about.text_encoder, str(files or "")
    return dataclasses.replace(about, vae=name, text_encoder=text_encoder, vae_folder=folder), files


def _vae_files(name: str) -> Path | None:
    """Returns the folder of an autoencoder that is local or included in the package, or None if it is on the Hub."""
    for folder in (Path(name).expanduser(), ASSETS / name):
        if folder.is_dir():
            return folder / VAE if (folder / VAE / "config.json").is_file() else folder
    if HUB_NAME.fullmatch(name):
        return None
    raise UserError(
        f"The image encoder {name!r} is neither a folder nor a repository name on the Hugging Face Hub. Set --vae to "
        "one of these."
    )


def _describe(about: "About") -> dict[str, Any]:
    """Returns the fields of the folder's config.json that describe the model."""
    optional = {name: getattr(about, name, None) for name in OPTIONAL}
    known = {name: value for name, value in optional.items() if value not in (None, "")}
    return {name: getattr(about, name) for name in ABOUT} | known


def _recipe(config: Mapping[str, Any], workdir: Path, step: int | None, params: str | None) -> "TrainingSummary":
    """Returns the training summary of a run, from its config and metrics."""
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


def _find_samples(workdir: Path, step: int | None, params: str | None) -> Path | None:
    """Returns the file with samples of a run's checkpoint, or of a model folder that is exported again."""
    if params == "raw":
        return None  # the runs' grids are sampled with the EMA weights
    file = workdir / (SAMPLES if step is None else f"samples/step_{step:08d}.png")
    return file if file.is_file() else None


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
    """Exports the model selected by the flags."""
    if not FLAGS.stablehlo and (FLAGS.sampler is not None or FLAGS.steps is not None):
        raise UserError("--sampler and --steps only affect StableHLO programs. Add --stablehlo, or remove them.")
    settings = ExportSettings(
        FLAGS.dtype, FLAGS.vae, FLAGS.text_encoder, FLAGS.license, FLAGS.stablehlo, FLAGS.sampler or "heun", FLAGS.steps
    )
    export(FLAGS.workdir, FLAGS.out, settings, step=FLAGS.step, params=FLAGS.params)


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Work directory of a run, or a model folder.", required=True)
    flags.DEFINE_string("out", None, "Model folder to create.", required=True)
    flags.DEFINE_integer("step", None, "Checkpoint of the run; by default the newest.")
    flags.DEFINE_enum("params", None, ["ema", "raw"], "EMA weights or raw parameters; by default EMA if available.")
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Dtype of the weights in the folder.")
    flags.DEFINE_string("vae", None, "Image encoder: a folder, which is copied, or a repository on the Hub.")
    flags.DEFINE_string("text_encoder", None, "Name of the text encoder, if the run's is not valid on other machines.")
    flags.DEFINE_string("license", None, "The Hub's license identifier for the weights; default: the attribution's.")
    flags.DEFINE_boolean("stablehlo", False, "Also write the denoiser as a program that does not need micro_dit.")
    flags.DEFINE_enum("sampler", None, list(SAMPLERS), "With --stablehlo: sampler in the signature; default: heun.")
    flags.DEFINE_integer("steps", None, "With --stablehlo: sampler steps in the signature; default: the model's.")


if __name__ == "__main__":
    run_command(main, define_flags)
