"""Launches an experiment with XManager, with one work unit for each set of overrides.

    pip install xmanager                 # best in a separate environment, since it has about 100 dependencies
    python launch/xm_launch.py --config=configs/mask75.py:small --sweep=mask_ratio --xm_dry_run
    python launch/xm_launch.py --config=configs/mask75.py:small --sweep=mask_ratio --workdir=runs/mask_ratio

Requirements of each `--executor`:
    local    None. If XManager is in a separate environment, set --python=.venv/bin/python. Work units run on this
             machine, one after another.
    vertex   A Google Cloud project and credentials, as described in XManager's README; IMAGE, an image built with
             launch/docker/Dockerfile; and BUCKET, which Vertex AI mounts at /gcs/BUCKET
             (https://cloud.google.com/vertex-ai/docs/training/cloud-storage-file-system).
    tpu      The requirements of launch/tpu_vm.sh. Each work unit is a separate slice, named TPU_NAME-1, TPU_NAME-2 …
Costs: `python -m micro_dit.budget` with the config of a work unit estimates its cost. The dry run is free.
Watch: the output of this command; `xmanager list` lists experiments; metrics.jsonl and TensorBoard logs are in the work
    directories.
Stop: Ctrl-C. XManager sends SIGTERM to local work units, which save; the same command resumes them. For vertex, use its
    console; for tpu, run `TPU_NAME=… launch/tpu_vm.sh delete` for each slice.
"""

import asyncio
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

ROOT = Path(__file__).resolve().parent.parent

# Each sweep is a list of overrides, one for each work unit. Add your own here.
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "none": [{}],
    "mask_ratio": [{"masking.ratio": ratio} for ratio in (0.0, 0.25, 0.5, 0.75, 0.875)],
    "seed": [{"seed": seed} for seed in range(3)],
    "learning_rate": [{"phases[0].learning_rate": rate} for rate in (1e-3, 3e-3)],
}

FLAGS = flags.FLAGS


def work_units(
    config: str, workdir: str, overrides: Sequence[Mapping[str, Any]], common: Sequence[str] = ()
) -> list[list[str]]:
    """Returns the flags of micro_dit.main for each work unit."""
    units = []
    for override in overrides:
        name = ",".join(f"{field}={value}" for field, value in override.items()) or "run"
        name = name.replace("[", ".").replace("]", "")  # Orbax interprets brackets in paths as patterns
        fields = [*common, *(f"{field}={value}" for field, value in override.items())]
        units.append([f"--config={config}", f"--workdir={workdir}/{name}", *(f"--config.{field}" for field in fields)])
    return units


def training_command(python: str, arguments: Sequence[str]) -> list[str]:
    """Returns the training command, which restarts until the run is done."""
    return [python, "launch/until_done.py", python, "-m", "micro_dit.main", *arguments]


def commands(executor: str, units: Sequence[Sequence[str]]) -> list[tuple[list[str], dict[str, str], str]]:
    """Returns command, environment variables and resources of each work unit."""
    if executor == "local":
        return [(training_command(FLAGS.python, unit), {}, "this machine") for unit in units]
    if executor == "vertex":
        return [(training_command("python", unit), {}, FLAGS.accelerator) for unit in units]
    name, kind = environment("TPU_NAME"), environment("ACCELERATOR_TYPE")
    found = []
    for number, unit in enumerate(units, 1):
        given = dict(flag.removeprefix("--").split("=", 1) for flag in unit[:2])
        variables = {"TPU_NAME": f"{name}-{number}", "CONFIG": given["config"], "RUN_NAME": given["workdir"]}
        found.append((["launch/tpu_vm.sh", "up", *unit[2:]], variables, kind))
    return found


def environment(name: str) -> str:
    """Returns an environment variable; exits if it is not set."""
    if not os.environ.get(name):
        sys.exit(f"error: --executor={FLAGS.executor} requires {name}. Set it; see the top of launch/xm_launch.py.")
    return os.environ[name]


def requirements() -> dict[str, int]:
    """Returns the accelerators of a work unit by their resource name."""
    resource, _, count = FLAGS.accelerator.partition("=")
    if not count.isdigit():
        sys.exit(f"error: --accelerator={FLAGS.accelerator} must have the form RESOURCE=COUNT, such as a100=8.")
    return {resource: int(count)}


def main(argv: Sequence[str]) -> None:
    """Launches the work units, or prints them with --xm_dry_run."""
    if len(argv) > 1:
        sys.exit(f"error: Unknown argument {argv[1]!r}. Set config fields with --override=FIELD=VALUE.")
    workdir = f"/gcs/{environment('BUCKET')}/{FLAGS.workdir}" if FLAGS.executor == "vertex" else FLAGS.workdir
    units = work_units(FLAGS.config, workdir, SWEEPS[FLAGS.sweep], FLAGS.override)
    jobs = commands(FLAGS.executor, units)
    for number, (command, variables, resources) in enumerate(jobs, 1):
        settings = "".join(f"{name}={shlex.quote(value)} " for name, value in variables.items())
        print(f"work unit {number} of {len(jobs)} on {resources}: {settings}{shlex.join(command)}", flush=True)
    if FLAGS.xm_dry_run:
        return
    os.chdir(ROOT)
    try:
        from xmanager import xm, xm_local
    except ImportError as error:
        sys.exit(f"error: Cannot import XManager ({error}). Run `pip install xmanager`, or use --xm_dry_run.")

    if FLAGS.executor == "vertex":
        executor = xm_local.Vertex(requirements=xm.JobRequirements(**requirements()))
        specification = xm.Container(image_path=environment("IMAGE"))
    else:
        executor = xm_local.Local()
        specification = xm.Binary(path="/usr/bin/env")

    async def launch() -> None:
        async with xm_local.create_experiment(experiment_title=f"{FLAGS.config} {FLAGS.sweep}") as experiment:
            [executable] = experiment.package([xm.Packageable(specification, executor.Spec())])
            for command, variables, _ in jobs:
                # The image's entry point already has the part of the command before the flags.
                arguments = command[command.index("micro_dit.main") + 1 :] if FLAGS.executor == "vertex" else command
                job = xm.Job(executable, executor, args=arguments, env_vars=variables)
                unit = await experiment.add(job)
                if FLAGS.executor == "local":  # work units share one machine, so they run one after another
                    await unit.wait_until_complete()

    try:
        asyncio.run(launch())
    except xm.ExperimentUnitError as error:
        sys.exit(f"error: A work unit ended before it was done ({error}). Run the same command to resume it.")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("config", None, "Config file, as in micro_dit.main.", required=True)
    flags.DEFINE_string("workdir", "runs/xm", "Folder that contains the work directory of each work unit.")
    flags.DEFINE_enum("sweep", "none", sorted(SWEEPS), "Name of the list of overrides, one for each work unit.")
    flags.DEFINE_multi_string("override", [], "FIELD=VALUE for all work units, passed as --config.FIELD=VALUE.")
    flags.DEFINE_enum("executor", "local", ["local", "vertex", "tpu"], "Platform that runs the work units.")
    flags.DEFINE_string("python", sys.executable, "With --executor=local: Python interpreter for training.")
    flags.DEFINE_string("accelerator", "a100=8", "With --executor=vertex: XManager's RESOURCE=COUNT.")
    flags.DEFINE_bool("xm_dry_run", False, "Print each work unit's command and resources without launching it.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
