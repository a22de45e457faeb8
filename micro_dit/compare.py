r"""Compares recipes at the same training FLOPs: which makes the most of a budget?

    python -m micro_dit.compare --configs=configs/mask75.py:small,configs/naive75.py:small --seeds=0,1,2 \
        --budget_flops=2e12,4e12 --out=runs/compare

Each recipe's phases are shortened or lengthened alike until they cost the budget, as `budget` counts it. Each run has a
work directory of its own and is trained, measured and reported in results.md, results.json and isoflop.png before the
next one starts. The same command resumes a comparison that was stopped, and --reuse=FOLDER copies the results of runs
that another comparison has finished. See docs/ablations.md.
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
        config: The config, with the steps that the budget pays for.
        workdir: Work directory.
        phases: Steps, and training FLOPs per step, of each phase.
        images: Number of training images, repetitions included.
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
        """The total number of steps."""
        return sum(steps for steps, _ in self.phases)

    @property
    def flops(self) -> int:
        """The training FLOPs: less than the budget by less than a step of the last phase."""
        return self.flops_at(self.steps)

    def flops_at(self, step: int) -> int:
        """Returns the training FLOPs until a step."""
        flops = 0
        for steps, cost in self.phases:
            flops += min(step, steps) * cost
            step -= min(step, steps)
        return flops


@dataclasses.dataclass(frozen=True)
class MeasurementSettings:
    """What is measured of each run.

    Attributes:
        metrics: Names from METRICS.
        num_images: For 'domain': number of images sampled from each model.
        guidance: For 'domain': guidance scale; by default the config's `sampling.guidance`.
        prompts: For 'domain': split of the captions, one of PROMPTS.

    Raises:
        UserError: A setting is not valid.
    """

    metrics: Sequence[str] = METRICS
    num_images: int = 64
    guidance: float | None = None
    prompts: str = "heldout"

    def __post_init__(self) -> None:
        check_names(self.metrics, METRICS)
        if self.num_images < 1:
            raise UserError("--num_images must be at least 1.")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UserError(f"--guidance={self.guidance}: give a finite number, such as 3.")
        if self.prompts not in PROMPTS:
            raise UserError(f"--prompts={self.prompts} is not one of {', '.join(PROMPTS)}.")

    def record(self) -> dict[str, Any]:
        """Returns the settings as result.json holds them: those of 'domain' only with 'domain'.

        Guidance and prompts are absent by default, as in the results of versions that lacked them.
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
        """Returns the request that measures 'ema' or 'raw' weights."""
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
        configs: Config files, each with an optional variant after ':' and fields after '+', as in
            'configs/mask75.py:small+masking.ratio=0.5+name=mask50'. The first is the baseline of the report.
        budgets: Training FLOPs.
        out: Folder of all runs and of the report.
        seeds: Seeds, with a run each.
        settings: What is measured; by default everything.
        reuse: Folders with results of earlier comparisons, as RUN/result.json. A run whose config and settings are
            those of its result there is not trained; the result is copied.
        say: Prints a line of progress.

    Returns:
        The results of all runs in the folder, of earlier calls too.

    Raises:
        UserError: A recipe can't be read or trained, a budget is too small, runs would share a folder, or a folder to
            reuse does not exist; before the first is trained.
        Stopped: The user has asked to stop.
    """
    settings, out = settings or MeasurementSettings(), Path(out)
    runs = plan_runs([read_config(text) for text in configs], budgets, seeds, out)
    if missing := [folder for folder in reuse if not Path(folder).is_dir()]:
        raise UserError(f"--reuse={missing[0]}: the folder does not exist; give one that holds RUN/{RESULT}.")
    todo = [run for run in runs if not _is_done(run, settings)]
    if len(todo) < len(runs):
        say(f"{len(runs) - len(todo)} of {len(runs)} runs are done already")
    for folder in reuse:
        rest = [run for run in todo if not _copy_result(run, settings, Path(folder))]
        say(f"{len(todo) - len(rest)} of {len(runs)} runs reused from {folder}")
        todo = rest
    started, flops = time.monotonic(), 0
    for number, run in enumerate(todo):
        left = ""
        if flops:
            minutes = (time.monotonic() - started) / flops * sum(run.flops for run in todo[number:]) / 60
            left = f", about {minutes:.0f} minutes left"
        say(f"—— run {len(runs) - len(todo) + number + 1} of {len(runs)}{left}: {run.workdir}, {run.steps:,} steps")
        _train_and_measure(run, settings, say)
        flops += run.flops
        write_report(out, runs[0].name)
    results = write_report(out, runs[0].name)
    say(f"{results_table(results, runs[0].name)}\n\n{out / 'results.md'}, results.json and isoflop.png keep it")
    return results


# ---- Planning --------------------------------------------------------------------------------------------------------


def read_config(text: str) -> ConfigDict:
    """Returns the config of 'FILE:VARIANT+FIELD=VALUE+…'; raises UserError if one of these is wrong."""
    path, *fields = text.split("+")
    file = path.partition(":")[0]
    if not Path(file).is_file():
        raise UserError(f"there is no config file {file}; see the folder configs/ for those there are.")
    try:
        config = load_config(path)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} can't be read as a config: {error}") from error
    for field in fields:
        name, _, value = field.partition("=")
        *parents, last = name.split(".")
        group = config
        for parent in parents:
            group = group.get(parent, {}) if isinstance(group, ConfigDict) else {}
        if last not in group:
            raise removed_field(name) if name in REMOVED_FIELDS else UserError(f"{path} has no field {name!r}.")
        try:
            with contextlib.suppress(ValueError, SyntaxError):  # other text is taken as it is
                value = ast.literal_eval(value)
            group[last] = value
        except TypeError as error:
            raise UserError(f"{text}: the value of {name} is of the wrong type ({error}).") from error
    return config


def plan_runs(configs: Sequence[Any], budgets: Sequence[float], seeds: Sequence[int], out: Path) -> list[ComparedRun]:
    """Returns the runs, seed after seed, so that a comparison that is cut short has all recipes.

    Raises:
        UserError: A recipe can't be trained, a budget is too small, or two runs would have the same folder.
    """
    if not configs or not budgets or not seeds:
        raise UserError("there is nothing to compare: give --configs, --budget_flops and --seeds.")
    names = [config.name for config in configs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"several configs are named {', '.join(repeated)}: give one another name, as in …+name=mine.")
    if bad := [budget for budget in budgets if not 0 < budget < math.inf]:
        raise UserError(f"--budget_flops={bad[0]:g}: give a number above 0, such as 4e12.")
    if len({f"{budget:g}" for budget in budgets}) < len(budgets) or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError("give each budget and each seed once, and seeds of at least 0.")
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
    """Returns the config with steps that cost the budget, and its (steps, FLOPs per step), images and parameters."""
    phases = make_phases(with_mask_ratio(config.phases, config.masking.ratio))
    networks, tokens = phase_networks(phases, config.model, config.data)
    costs = [
        phase.batch_size * training_flops(network, phase.mask_ratio, tokens, phase.mask_position)
        for phase, network in zip(phases, networks, strict=True)
    ]
    if budget < sum(costs):
        needed = f"of whose phases a step each costs {sum(costs):.3g}"
        raise UserError(f"a budget of {budget:g} FLOPs is too small for {config.name}, {needed}.")
    steps = fit_steps([phase.steps for phase in phases], costs, budget)
    config = copy.deepcopy(config)
    config.phases = tuple(_with_steps(phase, n) for phase, n in zip(config.phases, steps, strict=True))
    # Training evaluates the held-out loss only; images are sampled at the end.
    config.evaluate_every = max(1, sum(steps) // CURVE_POINTS)
    config.sampling.every, config.sampling.prompts = 0, ()
    config.logging.tensorboard = False
    return config, {
        "phases": tuple(zip(steps, costs, strict=True)),
        "images": sum(n * phase.batch_size for n, phase in zip(steps, phases, strict=True)),
        "parameters": sum(leaf.size for leaf in abstract_params(networks[-1]).values()),
    }


def fit_steps(steps: Sequence[int], costs: Sequence[int], budget: float) -> list[int]:
    """Returns at least 1 step for each phase, which together cost the budget up to a fraction of a last-phase step.

    Args:
        steps: Steps of each phase, which set its share of the FLOPs.
        costs: FLOPs of a step of each phase, together at most the budget.
        budget: Training FLOPs.
    """
    fitted, left = [], budget
    for index, cost in enumerate(costs):
        rest = [n * c for n, c in zip(steps[index:], costs[index:], strict=True)]
        most = int((left - sum(costs[index + 1 :])) // cost)  # that leaves a step to each later phase
        last = index == len(costs) - 1
        fitted.append(most if last else min(max(1, round(left * rest[0] / sum(rest) / cost)), most))
        left -= fitted[-1] * cost
    return fitted


def _with_steps(phase: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Returns the phase with another number of steps; warm-up and EMA span the same fraction of them."""
    factor = steps / phase["steps"]
    changed = {name: round(phase[name] * factor) for name in ("warmup_steps", "ema_start") if name in phase}
    if phase.get("ema_decay"):
        changed["ema_decay"] = phase["ema_decay"] ** (1 / factor)
    return {**phase, **changed, "steps": steps}


# ---- Running ---------------------------------------------------------------------------------------------------------


def _is_done(run: ComparedRun, settings: MeasurementSettings) -> bool:
    """Returns whether the work directory of a run has its result."""
    return _read_result(run, settings, run.workdir) is not None


def _copy_result(run: ComparedRun, settings: MeasurementSettings, folder: Path) -> bool:
    """Copies the result of a run from a folder of runs; returns False if the folder has none that can be reused."""
    text = _read_result(run, settings, folder / run.workdir.name)
    claimed = run.workdir / "config.json"
    if text is None or (claimed.exists() and not _resumes(run, json.loads(claimed.read_text())["config"])):
        return False  # training reports a work directory that belongs to another config
    write_atomically(run.workdir / RESULT, text)
    return True


def _resumes(run: ComparedRun, config: Mapping[str, Any]) -> bool:
    """Returns whether training the run would resume from a work directory with this config."""
    phases = with_mask_ratio(run.config.phases, run.config.masking.ratio)  # as training stores them
    return same_config(config, run.config.to_dict() | {"phases": phases})


def _read_result(run: ComparedRun, settings: MeasurementSettings, workdir: Path) -> str | None:
    """Returns the text of a result.json, or None if it is missing or of another config or other settings.

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
        # Two fields that a run may change when it resumes decide how its images are sampled.
        same_images = not ours["num_images"] or (
            theirs["steps"] == sampling.steps and ("guidance" in ours or theirs["guidance"] == sampling.guidance)
        )
        same = result["settings"] == ours and same_images and same_config(result["config"], run.config.to_dict())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} can't be read as a result ({error!r}); remove it to measure the run again.") from error
    return text if same else None


def _train_and_measure(run: ComparedRun, settings: MeasurementSettings, say: Callable[[str], None]) -> None:
    """Trains and measures a run, and writes result.json into its work directory.

    Raises:
        Stopped: The user has asked to stop.
    """
    started = time.monotonic()
    train(run.config, run.workdir)
    with contextlib.closing(Checkpoints(run.workdir)) as checkpoints:
        meta = checkpoints.read_meta(run.steps) if checkpoints.steps[:1] == [run.steps] else None
    if meta is None:
        raise Stopped(f"{run.workdir} is trained in part")
    params, other = ("ema", "raw") if run.config.phases[-1].get("ema_decay") else ("raw", "ema")
    with Interrupt() as interrupt:
        measures = ModelEvaluation(run.workdir, settings.request(params), load, lambda: interrupt.requested, say).run()
    values = {m.name + (f" ({other})" if m.images.get("params") == other else ""): m.value for m in measures}
    told = ("name", "budget", "seed", "flops", "steps", "images", "parameters")
    result = {name: getattr(run, name) for name in told} | {
        "training_seconds": meta["seconds"], "seconds": time.monotonic() - started, "measures": values,
        "curve": read_curve(run), "settings": settings.record(), "config": run.config.to_dict(),
    }  # fmt: skip
    write_atomically(run.workdir / RESULT, json.dumps(result, indent=2) + "\n")


def read_curve(run: ComparedRun) -> list[tuple[int, float]]:
    """Returns (training FLOPs, held-out loss) at each evaluation of a trained run, in ascending order.

    The loss is that of the EMA weights, and in a phase without EMA that of the raw weights.
    """
    path = run.workdir / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    losses = [(int(r["step"]), r.get("heldout_loss_ema", r["heldout_loss"])) for r in records if "heldout_loss" in r]
    return [(run.flops_at(step), loss) for step, loss in losses if math.isfinite(loss)]


def write_report(out: Path, baseline: str) -> list[dict[str, Any]]:
    """Writes results.md, results.json and isoflop.png for all finished runs in the folder; returns the results.

    Recipes are compared with that named `baseline`.
    """
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob(f"*/{RESULT}"))]
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_atomically(out / "results.md", results_table(results, baseline) + "\n")
    if results:
        plot_isoflop(results, out / "isoflop.png")
    return results


def main() -> None:
    """Compares the recipes of the flags."""
    say = functools.partial(print, flush=True)

    def numbers(flag: str, texts: Sequence[str], kind: type) -> list[Any]:
        try:
            return [kind(text) for text in texts]
        except ValueError as error:
            raise UserError(f"--{flag}={','.join(texts)}: {error}; give numbers with commas between.") from error

    settings = MeasurementSettings(FLAGS.metrics, FLAGS.num_images, FLAGS.guidance, FLAGS.prompts)
    try:
        compare(
            FLAGS.configs, numbers("budget_flops", FLAGS.budget_flops, float), FLAGS.out,
            seeds=numbers("seeds", FLAGS.seeds, int), settings=settings, reuse=FLAGS.reuse, say=say,
        )  # fmt: skip
    except Stopped as stopped:
        say(f"stopped: {stopped}; the same command goes on from there.")
    except KeyboardInterrupt:  # between two runs, or a second time
        say("stopped; the same command goes on from what is on the disk.")


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_list(
        "configs", None, "FILE[:VARIANT][+FIELD=VALUE…], with commas between, e.g. "
        "configs/mask75.py:small+name=mine. The first is the baseline of the table.",
        required=True,
    )  # fmt: skip
    flags.DEFINE_list("budget_flops", None, "Training FLOPs of a run, such as 2e12,4e12.", required=True)
    flags.DEFINE_list("seeds", ["0"], "Seeds, with a run each.")
    flags.DEFINE_string("out", "runs/compare", "Folder of the runs, the table and the plot.")
    flags.DEFINE_list(
        "reuse", [], "Folders of earlier comparisons, with commas between. A run whose RUN/result.json there has the "
        "same config and settings is not trained; its result is copied to --out.",
    )  # fmt: skip
    flags.DEFINE_list("metrics", list(METRICS), f"Some of {', '.join(METRICS)}; see docs/evaluation.md.")
    flags.DEFINE_integer("num_images", 64, "For 'domain': number of images sampled from each model.")
    flags.DEFINE_float("guidance", None, "For 'domain': guidance scale; by default the config's sampling.guidance.")
    flags.DEFINE_enum("prompts", "heldout", PROMPTS, "For 'domain': split of the captions.")


if __name__ == "__main__":
    run_command(main, define_flags)
