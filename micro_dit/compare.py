r"""Compares training recipes at equal training FLOPs.

    python -m micro_dit.compare --configs=configs/mask75.py:small,configs/naive75.py:small --seeds=0,1,2 \
        --budget_flops=2e12,4e12 --out=runs/compare

All phases of a recipe are scaled by the same factor to match the budget, with FLOPs counted as by `budget`. Each run
has its own work directory. It is trained, measured, and added to results.md, results.json and isoflop.png before the
next run starts. Run the same command again to resume a comparison. --reuse=FOLDER copies the results of finished runs
from another comparison. See docs/ablations.md.
"""

import ast
import contextlib
import copy
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from micro_dit.api import load
from micro_dit.cli import load_config, run_command
from micro_dit.errors import REMOVED_FIELDS, UserError, removed_field
from micro_dit.evaluation.evaluate_model import EvaluationRequest, ModelEvaluation, Stopped
from micro_dit.evaluation.isoflop import plot_isoflop, results_table
from micro_dit.evaluation.registry import check_names
from micro_dit.files import write_atomically
from micro_dit.models.dit import abstract_params
from micro_dit.models.flops import training_flops
from micro_dit.planning.networks import phase_networks
from micro_dit.train import train
from micro_dit.training.checkpoint import Checkpoints
from micro_dit.training.metrics import read_metrics
from micro_dit.training.phases import make_phases, with_mask_ratio
from micro_dit.training.save_schedule import Interrupt
from micro_dit.training.workdir import same_config

RESULT = "result.json"
METRICS = ("heldout_loss", "domain")
PROMPTS = ("heldout", "train")
CURVE_POINTS = 8  # evaluations of the held-out loss during a run; the end of each phase adds one


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """One training run.

    Attributes:
        name: Name of the recipe.
        budget: Training FLOPs to spend.
        seed: Seed of the run.
        config: The config, with the number of steps that fits the budget.
        workdir: Work directory.
        phases: (steps, training FLOPs per step) of each phase.
        images: Number of training images, including repetitions.
        parameters: Number of parameters of the last phase's network.
    """

    name: str
    budget: float
    seed: int
    config: Any
    workdir: Path
    phases: tuple[tuple[int, int], ...]
    images: int
    parameters: int

    @property
    def steps(self) -> int:
        """Total number of steps."""
        return sum(steps for steps, _ in self.phases)

    @property
    def flops(self) -> int:
        """Total training FLOPs, which are below the budget by less than one step of the last phase."""
        return self.flops_at(self.steps)

    def flops_at(self, step: int) -> int:
        """Returns the training FLOPs of the first `step` steps."""
        flops = 0
        for steps, cost in self.phases:
            flops += min(step, steps) * cost
            step -= min(step, steps)
        return flops


@dataclasses.dataclass(frozen=True)
class MeasurementSettings:
    """Settings of the measurements of each run.

    Attributes:
        metrics: Names from METRICS.
        num_images: For 'domain': number of images to sample from each model.
        guidance: For 'domain': guidance scale; by default `sampling.guidance` of the config.
        prompts: For 'domain': split of the captions, one of PROMPTS.

    Raises:
        UserError: A setting is invalid.
    """

    metrics: Sequence[str] = METRICS
    num_images: int = 64
    guidance: float | None = None
    prompts: str = "heldout"

    def __post_init__(self) -> None:
        check_names(self.metrics, METRICS)
        if self.num_images < 1:
            raise UserError(f"--num_images={self.num_images} is below 1. Set --num_images to at least 1.")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UserError(f"--guidance={self.guidance} is not finite. Set --guidance to a number such as 3.")
        if self.prompts not in PROMPTS:
            raise UserError(f"--prompts={self.prompts} is unknown. Set --prompts to one of {', '.join(PROMPTS)}.")

    def record(self) -> dict[str, Any]:
        """Returns the settings as they are stored in result.json.

        Settings of 'domain' are omitted without this metric. Default values of guidance and prompts are omitted too,
        because results of earlier versions do not have these fields.
        """
        if "domain" not in self.metrics:
            return {"metrics": sorted(self.metrics), "num_images": 0}
        record: dict[str, Any] = {"metrics": sorted(self.metrics), "num_images": self.num_images}
        if self.guidance is not None:
            record["guidance"] = self.guidance
        if self.prompts != "heldout":
            record["prompts"] = self.prompts
        return record

    def request(self, params: str) -> EvaluationRequest:
        """Returns the evaluation settings for the 'ema' or 'raw' weights."""
        guidance = () if self.guidance is None else (self.guidance,)
        return EvaluationRequest(
            self.metrics, params=params, num_images=self.num_images, guidance=guidance, prompts=self.prompts
        )


def compare(
    configs: Sequence[str], budgets: Sequence[float], out: str | Path, *, seeds: Sequence[int] = (0,),
    settings: MeasurementSettings | None = None, reuse: Sequence[str | Path] = (), say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:  # fmt: skip
    """Trains and measures every recipe with every budget and seed.

    Args:
        configs: Config files, each with an optional variant after ':' and overrides after '+', such as
            'configs/mask75.py:small+masking.ratio=0.5+name=mask50'. The first one is the baseline of the report.
        budgets: Training FLOPs of a run.
        out: Folder of all runs and of the report.
        seeds: Seeds. Each seed is a separate run.
        settings: Settings of the measurements.
        reuse: Folders of earlier comparisons. If a folder has RUN/result.json with the same config and settings, the
            result is copied and the run is not trained.
        say: Prints a progress line.

    Returns:
        The results of all runs in the folder, including those of earlier calls.

    Raises:
        UserError: A recipe can't be read or trained, a budget is too small, two runs have the same folder, or a folder
            to reuse does not exist. This is checked before the first run starts.
        Stopped: The user requested a stop.
    """
    settings, out = settings or MeasurementSettings(), Path(out)
    runs = plan_runs([read_config(text) for text in configs], budgets, seeds, out)
    if missing := [folder for folder in reuse if not Path(folder).is_dir()]:
        raise UserError(f"--reuse={missing[0]} does not exist. Set --reuse to folders that contain RUN/{RESULT}.")
    todo = [run for run in runs if not _is_done(run, settings)]
    if len(todo) < len(runs):
        say(f"{len(runs) - len(todo)} of {len(runs)} runs are already finished")
    for folder in reuse:
        rest = [run for run in todo if not _copy_result(run, settings, Path(folder))]
        say(f"{len(todo) - len(rest)} of {len(runs)} results reused from {folder}")
        todo = rest
    started, flops = time.monotonic(), 0
    for number, run in enumerate(todo):
        left = ""
        if flops:
            minutes = (time.monotonic() - started) / flops * sum(run.flops for run in todo[number:]) / 60
            left = f", about {minutes:.0f} minutes left"
        say(f"run {len(runs) - len(todo) + number + 1} of {len(runs)}{left}: {run.workdir}, {run.steps:,} steps")
        _train_and_measure(run, settings, say)
        flops += run.flops
        write_report(out, runs[0].name)
    results = write_report(out, runs[0].name)
    say(f"{results_table(results, runs[0].name)}\n\nWrote {out / 'results.md'}, results.json and isoflop.png")
    return results


# ---- Planning --------------------------------------------------------------------------------------------------------


def read_config(text: str) -> ConfigDict:
    """Returns the config of 'FILE:VARIANT+FIELD=VALUE+…'; raises UserError if the file, variant or a field is wrong."""
    path, *fields = text.split("+")
    file = path.partition(":")[0]
    if not Path(file).is_file():
        raise UserError(f"Config file {file} not found. Set --configs to files such as configs/mask75.py:small.")
    try:
        config = load_config(path)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"The config {path} can't be loaded: {error}") from error
    for field in fields:
        name, _, value = field.partition("=")
        *parents, last = name.split(".")
        group = config
        for parent in parents:
            group = group.get(parent, {}) if isinstance(group, ConfigDict) else {}
        if last not in group:
            if name in REMOVED_FIELDS:
                raise removed_field(name)
            raise UserError(f"The config {path} has no field {name!r}. Remove +{field} from --configs.")
        try:
            with contextlib.suppress(ValueError, SyntaxError):  # text that is not a literal is a string
                value = ast.literal_eval(value)
            group[last] = value
        except TypeError as error:
            raise UserError(
                f"The value of {name} in {text} has the wrong type ({error}). Change +{field} in --configs."
            ) from error
    return config


def plan_runs(configs: Sequence[Any], budgets: Sequence[float], seeds: Sequence[int], out: Path) -> list[ComparedRun]:
    """Returns the runs of a comparison.

    The runs are sorted by seed, so that a comparison that is stopped early covers all recipes.

    Raises:
        UserError: A recipe can't be trained, a budget is too small, or two runs have the same folder.
    """
    if not configs or not budgets or not seeds:
        raise UserError("There are no runs to compare. Set --configs, --budget_flops and --seeds.")
    names = [config.name for config in configs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"Several configs have the name {', '.join(repeated)}. Rename one of them with +name=NAME in --configs."
        )
    if bad := [budget for budget in budgets if not 0 < budget < math.inf]:
        raise UserError(
            f"--budget_flops={bad[0]:g} is not a positive number. Set --budget_flops to FLOPs such as 4e12."
        )
    if len({f"{budget:g}" for budget in budgets}) < len(budgets) or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError("--budget_flops or --seeds has repeated values or negative seeds. Remove them.")
    shortened = [(budget, _within(config, budget)) for budget in budgets for config in configs]
    runs = []
    for seed in seeds:
        for budget, (config, costs) in shortened:
            config = copy.deepcopy(config)
            config.seed = seed
            workdir = out / f"{config.name}-{budget:g}-{seed}".replace("e+", "e")
            runs.append(ComparedRun(config.name, budget, seed, config, workdir, **costs))
    return runs


def _within(config: Any, budget: float) -> tuple[Any, dict[str, Any]]:
    """Returns the config with the number of steps that fits the budget, and fields for `ComparedRun`.

    The fields are 'phases', 'images' and 'parameters'.
    """
    phases = make_phases(with_mask_ratio(config.phases, config.masking.ratio))
    networks, tokens = phase_networks(phases, config.model, config.data)
    costs = [
        phase.batch_size * training_flops(network, phase.mask_ratio, tokens, phase.mask_position)
        for phase, network in zip(phases, networks, strict=True)
    ]
    if budget < sum(costs):
        raise UserError(
            f"The budget of {budget:g} FLOPs is too small for {config.name}: one step of each phase costs "
            f"{sum(costs):.3g} FLOPs. Increase --budget_flops."
        )
    steps = fit_steps([phase.steps for phase in phases], costs, budget)
    config = copy.deepcopy(config)
    config.phases = tuple(_with_steps(phase, n) for phase, n in zip(config.phases, steps, strict=True))
    # During training only the held-out loss is evaluated. Images are sampled at the end.
    config.evaluate_every = max(1, sum(steps) // CURVE_POINTS)
    config.sampling.every, config.sampling.prompts = 0, ()
    config.logging.tensorboard = False
    return config, {
        "phases": tuple(zip(steps, costs, strict=True)),
        "images": sum(n * phase.batch_size for n, phase in zip(steps, phases, strict=True)),
        "parameters": sum(leaf.size for leaf in abstract_params(networks[-1]).values()),
    }


def fit_steps(steps: Sequence[int], costs: Sequence[int], budget: float) -> list[int]:
    """Returns the number of steps of each phase, at least 1, so that the phases use up a FLOPs budget.

    The remaining FLOPs are less than the cost of one step of the last phase.

    Args:
        steps: Original number of steps of each phase, which determine its share of the FLOPs.
        costs: FLOPs per step of each phase. Their sum is at most the budget.
        budget: Training FLOPs.
    """
    fitted, left = [], budget
    for index, cost in enumerate(costs):
        rest = [n * c for n, c in zip(steps[index:], costs[index:], strict=True)]
        most = int((left - sum(costs[index + 1 :])) // cost)  # leaves one step for each later phase
        last = index == len(costs) - 1
        fitted.append(most if last else min(max(1, round(left * rest[0] / sum(rest) / cost)), most))
        left -= fitted[-1] * cost
    return fitted


def _with_steps(phase: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Returns the phase with another number of steps, and warm-up and EMA scaled in proportion."""
    factor = steps / phase["steps"]
    changed = {name: round(phase[name] * factor) for name in ("warmup_steps", "ema_start") if name in phase}
    if phase.get("ema_decay"):
        changed["ema_decay"] = phase["ema_decay"] ** (1 / factor)
    return {**phase, **changed, "steps": steps}


# ---- Running ---------------------------------------------------------------------------------------------------------


def _is_done(run: ComparedRun, settings: MeasurementSettings) -> bool:
    """Returns whether the work directory of a run has a result with the same config and settings."""
    return _read_result(run, settings, run.workdir) is not None


def _copy_result(run: ComparedRun, settings: MeasurementSettings, folder: Path) -> bool:
    """Copies the result of a run from an earlier comparison; returns False if there is none that can be reused."""
    text = _read_result(run, settings, folder / run.workdir.name)
    existing = run.workdir / "config.json"
    if text is None or (existing.exists() and not _resumes(run, json.loads(existing.read_text())["config"])):
        return False  # if the work directory belongs to another config, training raises an error
    write_atomically(run.workdir / RESULT, text)
    return True


def _resumes(run: ComparedRun, config: Mapping[str, Any]) -> bool:
    """Returns whether the run can be resumed in a work directory with this config."""
    phases = with_mask_ratio(run.config.phases, run.config.masking.ratio)  # as stored by training
    return same_config(config, run.config.to_dict() | {"phases": phases})


def _read_result(run: ComparedRun, settings: MeasurementSettings, workdir: Path) -> str | None:
    """Returns the text of a result.json, or None if it is missing or has another config or other settings.

    Raises:
        UserError: The file is damaged.
    """
    if not (path := workdir / RESULT).exists():
        return None
    ours, sampling = settings.record(), run.config.sampling
    try:
        text = path.read_text(encoding="utf-8")
        result = json.loads(text)
        theirs = result["config"]["sampling"]
        # `same_config` ignores sampling.steps and sampling.guidance, but the metrics of images depend on them.
        same_images = not ours["num_images"] or (
            theirs["steps"] == sampling.steps and ("guidance" in ours or theirs["guidance"] == sampling.guidance)
        )
        same = result["settings"] == ours and same_images and same_config(result["config"], run.config.to_dict())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}). Delete it to measure the run again.") from error
    return text if same else None


def _train_and_measure(run: ComparedRun, settings: MeasurementSettings, say: Callable[[str], None]) -> None:
    """Trains and measures a run, and writes result.json to its work directory.

    Raises:
        Stopped: The user requested a stop.
    """
    started = time.monotonic()
    train(run.config, run.workdir)
    with contextlib.closing(Checkpoints(run.workdir)) as checkpoints:
        meta = checkpoints.read_meta(run.steps) if checkpoints.steps[:1] == [run.steps] else None
    if meta is None:
        raise Stopped(f"training of {run.workdir} is not complete")
    params, other = ("ema", "raw") if run.config.phases[-1].get("ema_decay") else ("raw", "ema")
    with Interrupt() as interrupt:
        measures = ModelEvaluation(run.workdir, settings.request(params), load, lambda: interrupt.requested, say).run()
    values = {m.name + (f" ({other})" if m.images.get("params") == other else ""): m.value for m in measures}
    fields = ("name", "budget", "seed", "flops", "steps", "images", "parameters")
    result = {name: getattr(run, name) for name in fields} | {
        "training_seconds": meta["seconds"], "seconds": time.monotonic() - started, "measures": values,
        "curve": read_curve(run), "settings": settings.record(), "config": run.config.to_dict(),
    }  # fmt: skip
    write_atomically(run.workdir / RESULT, json.dumps(result, indent=2) + "\n")


def read_curve(run: ComparedRun) -> list[tuple[int, float]]:
    """Returns (training FLOPs, held-out loss) at each evaluation of a trained run, in ascending order.

    The loss is measured with the EMA weights, or with the raw weights in a phase without EMA.
    """
    path = run.workdir / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    losses = [(int(r["step"]), r.get("heldout_loss_ema", r["heldout_loss"])) for r in records if "heldout_loss" in r]
    return [(run.flops_at(step), loss) for step, loss in losses if math.isfinite(loss)]


def write_report(out: Path, baseline: str) -> list[dict[str, Any]]:
    """Writes results.md, results.json and isoflop.png for all finished runs in a folder.

    Args:
        out: Folder of the comparison.
        baseline: Name of the baseline recipe.

    Returns:
        The results of the runs.
    """
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob(f"*/{RESULT}"))]
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_atomically(out / "results.md", results_table(results, baseline) + "\n")
    if results:
        plot_isoflop(results, out / "isoflop.png")
    return results


def main() -> None:
    """Compares the recipes in the flags."""
    say = functools.partial(print, flush=True)

    def numbers(flag: str, texts: Sequence[str], kind: type) -> list[Any]:
        try:
            return [kind(text) for text in texts]
        except ValueError as error:
            raise UserError(
                f"--{flag}={','.join(texts)} is not a list of numbers ({error}). Use comma-separated numbers."
            ) from error

    settings = MeasurementSettings(FLAGS.metrics, FLAGS.num_images, FLAGS.guidance, FLAGS.prompts)
    try:
        compare(
            FLAGS.configs, numbers("budget_flops", FLAGS.budget_flops, float), FLAGS.out,
            seeds=numbers("seeds", FLAGS.seeds, int), settings=settings, reuse=FLAGS.reuse, say=say,
        )  # fmt: skip
    except Stopped as stopped:
        say(f"Stopped: {stopped}. Run the same command again to resume.")
    except KeyboardInterrupt:  # raised between two runs, or by a second Ctrl-C
        say("Stopped. Run the same command again to resume.")


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_list(
        "configs", None, "Comma-separated configs FILE[:VARIANT][+FIELD=VALUE…], such as "
        "configs/mask75.py:small+name=mine. The first one is the baseline of the table.",
        required=True,
    )  # fmt: skip
    flags.DEFINE_list("budget_flops", None, "Training FLOPs of a run, such as 2e12,4e12.", required=True)
    flags.DEFINE_list("seeds", ["0"], "Seeds. Each seed is a separate run.")
    flags.DEFINE_string("out", "runs/compare", "Folder of the runs, the table and the plot.")
    flags.DEFINE_list(
        "reuse", [], "Comma-separated folders of earlier comparisons. If a folder has RUN/result.json with the same "
        "config and settings, the result is copied to --out and the run is not trained.",
    )  # fmt: skip
    flags.DEFINE_list("metrics", list(METRICS), f"Metrics, from {', '.join(METRICS)}. See docs/evaluation.md.")
    flags.DEFINE_integer("num_images", 64, "For domain: number of images to sample from each model.")
    flags.DEFINE_float("guidance", None, "For domain: guidance scale; by default the config's sampling.guidance.")
    flags.DEFINE_enum("prompts", "heldout", PROMPTS, "For domain: split of the captions.")


if __name__ == "__main__":
    run_command(main, define_flags)
