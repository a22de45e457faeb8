"""Compiles a run for chips that this machine does not have, and reports memory, a lower bound on time, and cost.

    python -m micro_dit.rehearse --config=configs/mask75.py:xl --topology=v5e:8x8 --config.mesh.fsdp=8

The training step and the sampler of each phase are compiled for the given chips; nothing is allocated or executed. The
exit status is 0 if both fit in the chips' memory. micro_dit/planning/rehearsal.py describes how times are estimated.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from micro_dit.cli import run_command
from micro_dit.diffusion.generate import MAX_BATCH
from micro_dit.errors import UserError
from micro_dit.parallel.mesh import make_mesh
from micro_dit.planning.aot import GPUS, Topology, compiler_versions, describe_devices
from micro_dit.planning.chips import CHIPS, Chip, measure_chip
from micro_dit.planning.networks import phase_networks
from micro_dit.planning.rehearsal import Rehearsal, Target, rehearsal_table, rehearse_phases
from micro_dit.training.phases import make_phases, with_mask_ratio
from micro_dit.training.recipe import make_recipe


def rehearse(
    config: Any, topology: Topology, only: str | None = None, optimization: str = "default",
    price: float | None = None, cache: Path | None = None, say: Callable[[str], None] = lambda text: None,
) -> tuple[list[Rehearsal], Chip]:  # fmt: skip
    """Compiles the training step and the sampler of each phase.

    Args:
        config: A config as returned by configs/mask75.py.
        topology: The chips to compile for.
        only: Name of the only phase to compile; None compiles all phases.
        optimization: 'default' or 'O0', see `compile_ahead`.
        price: Dollars per chip-hour; None uses the config's price, or the chip's list price.
        cache: Folder that caches the results of compilations; None disables the cache.
        say: Prints a line of progress.

    Returns:
        The rehearsal of each phase, and the chip.

    Raises:
        UserError: The config can't be trained on this topology, or the compiler for the topology is not installed.
    """
    phases, recipe = make_phases(with_mask_ratio(config.phases, config.masking.ratio)), make_recipe(config)
    names = [phase.name for phase in phases]
    if only is not None and only not in names:
        raise UserError(f"Config has no phase {only!r}. Set --phase to one of {', '.join(names)}.")
    phases = tuple(phase for phase in phases if only in (None, phase.name))
    devices = describe_devices(topology)
    chip = fake_cpu(topology.size) if topology.chip == "cpu" else CHIPS[topology.chip]
    price = config.cost.dollars_per_device_hour or chip.price if price is None else price
    target = Target(topology, chip, make_mesh(config.mesh, devices), optimization, cache, say)
    networks, text_tokens = phase_networks(phases, config.model, config.data)
    images, guided = min(MAX_BATCH, len(config.sampling.prompts) or MAX_BATCH), config.sampling.guidance != 1
    return rehearse_phases(phases, networks, recipe, text_tokens, target, images, guided, price), chip


def fake_cpu(devices: int) -> Chip:
    """Returns one of `devices` fake CPU devices that share this machine's memory and its measured peak FLOP/s."""
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    chip = measure_chip()
    return dataclasses.replace(chip, peak_flops=chip.peak_flops / devices, memory=memory / devices)


def main() -> None:
    """Prints the rehearsal; raises UserError if the run does not fit in memory."""
    config = FLAGS.config
    if config is None or FLAGS.topology is None:
        raise UserError(
            "--config and --topology are required, for example --config=configs/mask75.py --topology=cpu:8."
        )
    topology, started = Topology.parse(FLAGS.topology), time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {text}", file=sys.stderr, flush=True)

    if topology.chip != "cpu":
        # JAX would try to load cached programs on the devices of this machine, which fails for another platform.
        jax.config.update("jax_enable_compilation_cache", False)
    kept: Any = jax.config
    cache = Path(kept.jax_compilation_cache_dir) / "rehearsals"
    rehearsals, chip = rehearse(config, topology, FLAGS.phase, FLAGS.optimization, FLAGS.price_per_hour, cache, say)
    fits = all(rehearsal.fits for rehearsal in rehearsals)
    if FLAGS.json:
        about = {"topology": str(topology), "chips": topology.size, "chip": dataclasses.asdict(chip), "fits": fits}
        about |= {"versions": compiler_versions(topology), "optimization": FLAGS.optimization}
        print(json.dumps(about | {"phases": [rehearsal.to_json() for rehearsal in rehearsals]}, indent=2))
    else:
        print(rehearsal_table(rehearsals, topology, chip))
    if not fits:
        reasons = [f"Phase {r.phase}: {r.suggestion or 'the sampler is too large'}." for r in rehearsals if not r.fits]
        raise UserError(f"The run does not fit in {chip.memory / 1e9:.1f} GB per chip. {' '.join(reasons)}")


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/mask75.py:xl.")
    flags.DEFINE_string(
        "topology", None, f"Chips to compile for, such as v5e:8x8, v6e:8x8, v5p:4x4x4, {next(iter(GPUS))}:8 or cpu:8."
    )
    flags.DEFINE_string("phase", None, "Name of the only phase to compile; by default all phases.")
    flags.DEFINE_enum(
        "optimization", "default", ["default", "O0"],
        "Optimization level of XLA. O0 compiles faster and reports nearly the same memory.",
    )  # fmt: skip
    flags.DEFINE_float(
        "price_per_hour", None,
        "Dollars per chip-hour; by default cost.dollars_per_device_hour of the config, or the chip's list price.",
    )  # fmt: skip
    flags.DEFINE_bool("json", False, "Print JSON instead of a table.")


if __name__ == "__main__":
    run_command(main, define_flags, takes_config=True)
