"""Compiles a run for hardware that is not there: does it fit, how fast can it be, what will it cost?

    python -m micro_dit.rehearse --config=configs/mask75.py:xl --topology=v5e:8x8 --config.mesh.fsdp=8

The real training step and sampler of each phase are compiled for the described chips; nothing is allocated and nothing
runs. The exit status is 0 if everything fits in the chips' memory. The times are a roofline: what the chip needs at
least if compute, memory and interconnect are each as fast as their data sheet says and overlap perfectly.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from micro_dit.budget import manifest_of
from micro_dit.cli import run_command
from micro_dit.diffusion.generate import MAX_BATCH, Denoising
from micro_dit.errors import UserError
from micro_dit.models.config import DiTConfig
from micro_dit.models.flops import training_flops
from micro_dit.parallel import mesh as meshes
from micro_dit.parallel.sharding import bytes_per_device
from micro_dit.planning import aot as ahead
from micro_dit.planning.aot import Compiled, Topology, abstract_train_step, compile_ahead, describe_devices
from micro_dit.planning.chips import CHIPS, Chip, measure_chip
from micro_dit.planning.collectives import Traffic
from micro_dit.planning.cost import lines_of
from micro_dit.planning.mxu_padding import MATRIX_UNITS, padding
from micro_dit.training.phases import Phase, make_phases
from micro_dit.training.recipe import Recipe, make_recipe, with_mask_ratio
from micro_dit.training.step import network_of


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What a phase was found to need. Bytes, seconds and FLOPs of `step` and `sampler` are those of one chip.

    Attributes:
        phase: its name.
        parameters: of the network.
        state_bytes: of parameters, optimizer and moving average on one chip.
        batch_size, microbatch: images per step, and per pass; over all chips.
        step: the training step, compiled.
        sampler: the sampler, compiled; for `sampler_images` images at once.
        flops: of a step on all chips: the network's, counted by hand.
        compiler_flops: of a step on all chips: what the compiler counts, recomputed activations and all that is no
            matrix product included; for GPUs, whose compiler counts none, of the program that it is given.
        padding: share of a TPU's matrix units' work that is padding; it is not in `compute`.
        compute, memory, interconnect: seconds that a step needs at least for each.
        hours, dollars: of the whole phase at that speed; dollars are None where no price is known.
        suggestion: what to change if the step does not fit.
    """

    phase: str
    parameters: int
    state_bytes: int
    batch_size: int
    microbatch: int
    step: Compiled
    sampler: Compiled
    sampler_images: int
    flops: float
    compiler_flops: float
    padding: float | None
    compute: float
    memory: float
    interconnect: float
    hours: float
    dollars: float | None
    fits: bool
    suggestion: str

    @property
    def seconds(self) -> float:
        """Of a step: the slowest of the three."""
        return max(self.compute, self.memory, self.interconnect)

    def to_json(self) -> dict[str, Any]:
        """All of it, with what follows from it."""
        peaks = {"peak_bytes": self.step.peak, "sampler_peak_bytes": self.sampler.peak}
        derived = {"seconds_per_step": self.seconds, "images_per_second": self.batch_size / self.seconds}
        return dataclasses.asdict(self) | peaks | derived


def rehearse(
    config: Any, topology: Topology, only: str | None = None, optimization: str = "default",
    price: float | None = None, cache: Path | None = None, say: Callable[[str], None] = lambda text: None,
) -> tuple[list[Rehearsal], Chip]:  # fmt: skip
    """Compiles the training step and the sampler of a recipe's phases.

    Args:
        config: see configs/mask75.py.
        topology: what to compile for.
        only: the name of the only phase to compile; by default all.
        optimization: 'default' or 'O0', see `compile_ahead`.
        price: dollars per chip-hour; by default the config's, or the chip's.
        cache: a folder where what was found of a program is kept, so that a rehearsal that was killed goes on.
        say: called with lines of progress.

    Returns:
        The phases' rehearsals, and the chip.

    Raises:
        UserError: the config can't be trained on this topology, or the compiler for it is missing.
    """
    config = with_mask_ratio(config)
    phases, recipe = make_phases(config.phases), make_recipe(config)
    if only is not None and only not in [phase.name for phase in phases]:
        raise UserError(f"there is no phase {only!r}; the phases are {', '.join(phase.name for phase in phases)}.")
    devices = describe_devices(topology)
    chip = fake_cpu(topology.size) if topology.chip == "cpu" else CHIPS[topology.chip]
    if price is None:
        price = config.cost.dollars_per_device_hour or chip.price
    mesh = meshes.make_mesh(config.mesh, devices)
    samplers: dict[DiTConfig, Compiled] = {}
    rehearsals = []
    for phase in phases:
        if only not in (None, phase.name):
            continue
        recipe.check_batch(phase, mesh)
        manifest = manifest_of(config, phase.shards or config.data.shards)
        network = network_of(phase, config.model, manifest.vae, manifest.text_encoder)
        text_tokens = manifest.text_encoder.tokens
        step, microbatch, suggestion = _fit(
            network, phase, recipe, mesh, text_tokens, topology, chip, optimization, cache, say
        )
        state = abstract_train_step(network, phase, recipe, mesh, text_tokens)[1]
        if network not in samplers:
            say(f"compiling the sampler of phase {phase.name}")
            samplers[network] = _compile_sampler(
                network, config, state.params, mesh, text_tokens, topology, optimization, cache, say
            )
        images = phase.batch_size
        per_image = training_flops(network, phase.mask_ratio, text_tokens, phase.mask_position)
        passes = images // microbatch  # the compiler counts the body of a loop once
        counted = step.flops or _flops_before_optimization(network, phase, recipe, text_tokens) / topology.size
        counted *= passes
        # Where the compiler does not tell: each argument is read, each result and temporary written, the latter read.
        accessed = step.bytes_accessed or step.arguments + step.outputs + 2 * step.temporaries
        compute = max(float(per_image) * images / topology.size, counted) / chip.peak_flops
        memory = accessed * passes / chip.bandwidth if chip.bandwidth else 0.0
        sent = sum(traffic.sent for traffic in step.traffic.values())
        interconnect = sent / chip.interconnect if chip.interconnect else 0.0
        hours = phase.steps * max(compute, memory, interconnect) / 3600
        rehearsals.append(
            Rehearsal(
                phase=phase.name, parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
                state_bytes=bytes_per_device(state, jax.tree.map(lambda leaf: leaf.sharding, state)),
                batch_size=images, microbatch=microbatch, step=step, sampler=samplers[network],
                sampler_images=_sampler_images(config), flops=float(per_image) * images,
                compiler_flops=counted * topology.size,
                padding=_padding(network, phase, recipe, microbatch, mesh, text_tokens, topology.chip),
                compute=compute, memory=memory, interconnect=interconnect, hours=hours,
                dollars=None if price is None else hours * topology.size * price,
                fits=not suggestion and samplers[network].peak <= chip.memory, suggestion=suggestion,
            )
        )  # fmt: skip
    return rehearsals, chip


def fake_cpu(devices: int) -> Chip:
    """One of several fake devices that share this machine's cores and memory: its peak is measured."""
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    chip = measure_chip()
    return dataclasses.replace(chip, peak_flops=chip.peak_flops / devices, memory=memory / devices)


def _fit(
    network: DiTConfig, phase: Phase, recipe: Recipe, mesh: jax.sharding.Mesh, text_tokens: int, topology: Topology,
    chip: Chip, optimization: str, cache: Path | None, say: Callable[[str], None],
) -> tuple[Compiled, int, str]:  # fmt: skip
    """The step of a phase as the recipe has it, its microbatch, and what to change if it does not fit (else '')."""

    def compiled(microbatch: int) -> Compiled:
        at_once = f" in passes of {microbatch}" if microbatch < phase.batch_size else ""
        title = f"compiling phase {phase.name}: {phase.batch_size} images a step{at_once}"
        say(title)
        function, state, batch, key, out_shardings = abstract_train_step(
            network, phase, dataclasses.replace(recipe, microbatch=microbatch), mesh, text_tokens
        )
        found = compile_ahead(
            function, (state, batch, key), topology, out_shardings=out_shardings, donate_argnums=(0,),
            optimization=optimization, cache=cache, progress=lambda seconds: say(f"{title} … {seconds:.0f} s"),
        )  # fmt: skip
        say(f"{title}: {found.peak / 1e9:.3g} of {chip.memory / 1e9:.3g} GB per chip; took {found.seconds:.0f} s")
        return found

    asked = recipe.microbatch or phase.batch_size
    step = compiled(asked)
    if step.peak <= chip.memory:
        return step, asked, ""
    state = abstract_train_step(network, phase, recipe, mesh, text_tokens)[1]
    held = bytes_per_device(state, jax.tree.map(lambda leaf: leaf.sharding, state))
    gradients = bytes_per_device(state.params, jax.tree.map(lambda leaf: leaf.sharding, state.params))
    shards = meshes.batch_shards(mesh)
    sizes = [n for n in range(shards, asked, shards) if phase.batch_size % n == 0]
    # Accumulating takes one more copy of the gradients.
    peaks = {0: float(held + gradients), asked: float(step.peak)}
    largest = largest_that_fits(sizes, peaks, chip.memory, lambda microbatch: compiled(microbatch).peak)
    if largest:
        return step, asked, f"with --config.microbatch={largest} it takes {peaks[largest] / 1e9:.3g} GB and fits"
    least = peaks[min(peaks.keys() - {0})] / 1e9
    return step, asked, (
        f"no microbatch fits: even with {shards} images at once it takes {least:.3g} GB, {held / 1e9:.3g} of them for "
        "parameters, optimizer and average; share those among more chips (--config.mesh.fsdp) or take larger chips"
    )  # fmt: skip


def largest_that_fits(
    sizes: Sequence[int], peaks: dict[int, float], limit: float, peak_of: Callable[[int], float]
) -> int:
    """The largest microbatch whose peak is within the limit; 0 if none is.

    What a step needs beyond its state grows about in proportion to its microbatch. So the next to be compiled is the
    largest that lies within the limit on a line through two that are known. If none does, that is believed of all but
    the smallest.

    Args:
        sizes: possible microbatches, ascending.
        peaks: bytes by microbatch: known of one that is too large, estimated of 0; what is found is added.
        limit: bytes.
        peak_of: compiles a microbatch: minutes.
    """
    fits, too_large = 0, max(peaks)
    other = 0  # besides the smallest that is too large
    while between := [n for n in sizes if fits < n < too_large]:
        slope = (peaks[too_large] - peaks[other]) / (too_large - other)
        likely = [n for n in between if peaks[too_large] + slope * (n - too_large) <= limit]
        if fits and not likely:
            break
        tried = max(likely, default=between[0])
        peaks[tried] = peak_of(tried)
        if peaks[tried] <= limit:
            fits = other = tried
        else:
            too_large, other = tried, fits or too_large
    return fits


def _flops_before_optimization(network: DiTConfig, phase: Phase, recipe: Recipe, text_tokens: int) -> float:
    """Of a step, for all chips together; the body of a loop is counted once."""
    one = meshes.make_mesh(devices=jax.devices()[:1])
    function, state, batch, key, _ = abstract_train_step(network, phase, recipe, one, text_tokens)
    return (jax.jit(function).lower(state, batch, key).cost_analysis() or {}).get("flops", 0.0)


def _padding(
    network: DiTConfig, phase: Phase, recipe: Recipe, microbatch: int, mesh: jax.sharding.Mesh, text_tokens: int,
    chip: str,
) -> float | None:  # fmt: skip
    """Of a pass with one chip's images; None if it is no TPU. Widths are whole: 'tensor' shares are not considered."""
    if chip not in MATRIX_UNITS:
        return None
    phase = dataclasses.replace(phase, batch_size=microbatch // meshes.batch_shards(mesh))
    recipe, one = dataclasses.replace(recipe, microbatch=0), meshes.make_mesh(devices=jax.devices()[:1])
    function, state, batch, key, _ = abstract_train_step(network, phase, recipe, one, text_tokens)
    return padding(jax.make_jaxpr(function)(state, batch, key), chip)


def _sampler_images(config: Any) -> int:
    return min(MAX_BATCH, len(config.sampling.prompts) or MAX_BATCH)


def _compile_sampler(
    network: DiTConfig, config: Any, params: Any, mesh: jax.sharding.Mesh, text_tokens: int, topology: Topology,
    optimization: str, cache: Path | None, say: Callable[[str], None],
) -> Compiled:  # fmt: skip
    """A call of the sampler as it draws while training: parameters where they are, the prompts on every chip."""
    everywhere = meshes.replicated(mesh)
    denoising = Denoising(
        network, sigma_data=config.diffusion.sigma_data, dtype=jnp.dtype(config.dtype), sharding=everywhere
    )
    call, arguments = denoising.abstract_call(
        params, _sampler_images(config), text_tokens, everywhere, guided=config.sampling.guidance != 1
    )
    return compile_ahead(
        call, arguments, topology, out_shardings=everywhere, optimization=optimization, cache=cache,
        progress=lambda seconds: say(f"compiling the sampler … {seconds:.0f} s"),
    )  # fmt: skip


def table(rehearsals: Sequence[Rehearsal], topology: Topology, chip: Chip) -> str:
    """The rehearsals as lines of text."""
    rows = [["phase"], ["parameters"], ["images a step"], ["  in passes of"]]
    rows += [[f"GB per chip, of {chip.memory / 1e9:.1f}"], ["  arguments"], ["  temporaries"], ["  peak"]]
    rows += [["  sampler's peak"], ["fits"], ["TFLOP per step, counted by hand"], ["  by the compiler"]]
    rows += [["padding of the products, on TPUs"], ["collectives per step, MB per chip"]]
    kinds = sorted({kind for rehearsal in rehearsals for kind in rehearsal.step.traffic})
    rows += [[f"  {kind}"] for kind in kinds]
    rows += [["ms per step, at least: compute"], ["  memory"], ["  interconnect"], ["images/s, at most"]]
    rows += [["days, at least"], ["chip-hours, at least"], ["dollars, at least"], ["compiled in s"]]
    for r in rehearsals:
        column = [r.phase, f"{r.parameters:,}", f"{r.batch_size:,}", f"{r.microbatch:,}", ""]
        known = r.step.memory_limit is None
        column += [f"{b / 1e9:.3g}" if known else "–" for b in (r.step.arguments, r.step.temporaries)]
        column += [f"{b / 1e9:.3g}" for b in (r.step.peak, r.sampler.peak)]
        column += ["yes" if r.fits else "NO", f"{r.flops / 1e12:,.3g}"]
        column += [f"{r.compiler_flops / 1e12:,.3g}", "–" if r.padding is None else f"{r.padding:.1%}", ""]
        for kind in kinds:
            column.append(_of_kind(r.step.traffic.get(kind)))
        column += [f"{1000 * seconds:,.3g}" for seconds in (r.compute, r.memory, r.interconnect)]
        column += [f"{r.batch_size / r.seconds:,.0f}", f"{r.hours / 24:,.3g}", f"{r.hours * topology.size:,.3g}"]
        column += ["–" if r.dollars is None else f"{r.dollars:,.0f}", f"{r.step.seconds:,.0f}"]
        for row, cell in zip(rows, column, strict=True):
            row.append(cell)
    days, dollars = sum(r.hours for r in rehearsals) / 24, [r.dollars for r in rehearsals if r.dollars is not None]
    head = f"{topology}, {topology.size} chips; predicted for the phases together: at least {days:,.3g} days"
    if dollars and days:
        an_hour = sum(dollars) / (24 * days * topology.size)
        head += f" and ${sum(dollars):,.0f}, at ${an_hour:.2f} a chip-hour"
    return "\n".join([head, "", lines_of(rows, total=False)])


def _of_kind(traffic: Traffic | None) -> str:
    """How many collectives, the mean of their MB, and how many of them run behind other work."""
    if traffic is None:
        return "–"
    hidden = f", {traffic.hidden:,} hidden" if traffic.hidden else ""
    return f"{traffic.count:,} × {traffic.bytes / traffic.count / 1e6:,.3g}{hidden}"


def main() -> None:
    config = FLAGS.config
    if config is None or FLAGS.topology is None:
        raise UserError("give --config and --topology; try --config=configs/mask75.py --topology=cpu:8.")
    topology, started = Topology.parse(FLAGS.topology), time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {text}", file=sys.stderr, flush=True)

    if topology.chip != "cpu":
        # A program for other devices can't be loaded from the cache by the devices here.
        jax.config.update("jax_enable_compilation_cache", False)
    kept: Any = jax.config
    cache = Path(kept.jax_compilation_cache_dir) / "rehearsals"
    rehearsals, chip = rehearse(config, topology, FLAGS.phase, FLAGS.optimization, FLAGS.price_per_hour, cache, say)
    fits = all(rehearsal.fits for rehearsal in rehearsals)
    if FLAGS.json:
        about = {"topology": str(topology), "chips": topology.size, "chip": dataclasses.asdict(chip), "fits": fits}
        about |= {"versions": ahead.compiler_versions(topology), "optimization": FLAGS.optimization}
        print(json.dumps(about | {"phases": [rehearsal.to_json() for rehearsal in rehearsals]}, indent=2))
    else:
        print(table(rehearsals, topology, chip))
    if not fits:
        reasons = [f"{r.phase}: {r.suggestion or 'the sampler is too large'}" for r in rehearsals if not r.fits]
        raise UserError(f"it does not fit in {chip.memory / 1e9:.1f} GB per chip; {'; '.join(reasons)}.")


FLAGS = flags.FLAGS


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "The recipe, e.g. configs/mask75.py:xl.")
    flags.DEFINE_string("topology", None, f"v5e:8x8, v6e:8x8, v5p:4x4x4, {next(iter(ahead.GPUS))}:8 or cpu:8.")
    flags.DEFINE_string("phase", None, "Only this phase; by default all.")
    flags.DEFINE_enum("optimization", "default", ["default", "O0"], "O0 compiles faster; memory is nearly the same.")
    flags.DEFINE_float("price_per_hour", None, "Dollars per chip-hour; by default the config's, or the chip's.")
    flags.DEFINE_bool("json", False, "Print JSON.")


if __name__ == "__main__":
    run_command(main, define_flags, takes_config=True)
