r"""Compares recipes at the same training FLOPs: which makes the most of a budget?

    python -m micro_dit.compare --configs=configs/mask75.py:small,configs/naive75.py:small --seeds=0,1,2 \
        --budget_flops=2e12,4e12 --out=runs/compare

Each recipe's phases are shortened or lengthened alike until they cost the budget, as `budget` counts it. Each run has a
work directory of its own and is trained, measured and reported in results.md, results.json and isoflop.png before the
next one starts. The same command resumes a comparison that was stopped. See docs/ablations.md.
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
from micro_dit.training.phases import make_phases, with_mask_ratio
from micro_dit.training.save_schedule import Interrupt

RESULT = "result.json"
METRICS = ("heldout_loss", "domain")


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """One training run.

    `flops` is what the phases of `config` cost: less than the budget by less than a step of the last phase.
    """

    name: str
    budget: float
    seed: int
    config: Any
    workdir: Path
    flops: int
    steps: int
    images: int
    parameters: int


def compare(
    configs: Sequence[str], budgets: Sequence[float], out: str | Path, *, seeds: Sequence[int] = (0,),
    metrics: Sequence[str] = METRICS, num_images: int = 64, say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:  # fmt: skip
    """Trains and measures every recipe with every budget and seed.

    Args:
        configs: Config files, each with an optional variant after ':' and fields after '+', as in
            'configs/mask75.py:small+masking.ratio=0.5+name=mask50'.
        budgets: Training FLOPs.
        out: Folder of all runs and of the report.
        seeds: Seeds, with a run each.
        metrics: Names from METRICS.
        num_images: Images of held-out captions that are sampled from each model for 'domain'.
        say: Prints a line of progress.

    Returns:
        The results of all runs in the folder, of earlier calls too.

    Raises:
        UserError: A recipe can't be read or trained, a budget is too small, or runs would share a folder; before the
            first is trained.
        Stopped: The user has asked to stop.
    """
    check_names(metrics, METRICS)
    if num_images < 1:
        raise UserError("--num_images must be at least 1.")
    out = Path(out)
    runs = plan_runs([read_config(text) for text in configs], budgets, seeds, out)
    settings = {"metrics": sorted(metrics), "num_images": num_images if "domain" in metrics else 0}
    todo = [run for run in runs if not _is_done(run, settings)]
    if len(todo) < len(runs):
        say(f"{len(runs) - len(todo)} of {len(runs)} runs are done already")
    started, flops = time.monotonic(), 0
    for number, run in enumerate(todo):
        left = ""
        if flops:
            minutes = (time.monotonic() - started) / flops * sum(run.flops for run in todo[number:]) / 60
            left = f", about {minutes:.0f} minutes left"
        say(f"—— run {len(runs) - len(todo) + number + 1} of {len(runs)}{left}: {run.workdir}, {run.steps:,} steps")
        _train_and_measure(run, settings, say)
        flops += run.flops
        write_report(out)
    results = write_report(out)
    say(f"{results_table(results)}\n\n{out / 'results.md'}, results.json and isoflop.png keep it")
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


def _within(config: Any, budget: float) -> tuple[Any, dict[str, int]]:
    """Returns the config with steps that cost the budget, and its FLOPs, steps, images and parameters."""
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
    # What is measured is measured at the end, and nothing else is drawn.
    config.evaluate_every = config.sampling.every = 0
    config.sampling.prompts = ()
    config.logging.tensorboard = False
    return config, {
        "flops": sum(n * cost for n, cost in zip(steps, costs, strict=True)),
        "steps": sum(steps),
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


def _is_done(run: ComparedRun, settings: Mapping[str, Any]) -> bool:
    if not (path := run.workdir / RESULT).exists():
        return False
    done = json.loads(path.read_text(encoding="utf-8"))
    return done["settings"] == settings and done["config"] == json.loads(json.dumps(run.config.to_dict()))


def _train_and_measure(run: ComparedRun, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
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
    request = EvaluationRequest(settings["metrics"], params=params, num_images=settings["num_images"] or None)
    with Interrupt() as interrupt:
        measures = ModelEvaluation(run.workdir, request, load, lambda: interrupt.requested, say).run()
    values = {m.name + (f" ({other})" if m.images.get("params") == other else ""): m.value for m in measures}
    told = ("name", "budget", "seed", "flops", "steps", "images", "parameters")
    result = {name: getattr(run, name) for name in told} | {
        "training_seconds": meta["seconds"], "seconds": time.monotonic() - started, "measures": values,
        "settings": settings, "config": run.config.to_dict(),
    }  # fmt: skip
    write_atomically(run.workdir / RESULT, json.dumps(result, indent=2) + "\n")


def write_report(out: Path) -> list[dict[str, Any]]:
    """Writes results.md, results.json and isoflop.png for all finished runs in the folder; returns the results."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob(f"*/{RESULT}"))]
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_atomically(out / "results.md", results_table(results) + "\n")
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

    try:
        compare(
            FLAGS.configs, numbers("budget_flops", FLAGS.budget_flops, float), FLAGS.out,
            seeds=numbers("seeds", FLAGS.seeds, int), metrics=FLAGS.metrics, num_images=FLAGS.num_images, say=say,
        )  # fmt: skip
    except Stopped as stopped:
        say(f"stopped: {stopped}; the same command goes on from there.")
    except KeyboardInterrupt:  # between two runs, or a second time
        say("stopped; the same command goes on from what is on the disk.")


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_list(
        "configs", None, "FILE[:VARIANT][+FIELD=VALUE…], with commas between; e.g. configs/mask75.py:small+name=mine.",
        required=True,
    )  # fmt: skip
    flags.DEFINE_list("budget_flops", None, "Training FLOPs of a run, such as 2e12,4e12.", required=True)
    flags.DEFINE_list("seeds", ["0"], "A run each.")
    flags.DEFINE_string("out", "runs/compare", "Folder of the runs, the table and the plot.")
    flags.DEFINE_list("metrics", list(METRICS), f"Some of {', '.join(METRICS)}; see docs/evaluation.md.")
    flags.DEFINE_integer("num_images", 64, "Drawn of each model with held-out captions, for 'domain'.")


if __name__ == "__main__":
    run_command(main, define_flags)
