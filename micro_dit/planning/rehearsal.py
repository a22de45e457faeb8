"""Compiles the training step and the sampler of a run for described chips, and derives memory, time and cost.

Nothing is allocated and nothing runs. Times are a roofline: the least that a step needs if compute, memory and
interconnect each reach the figures of the data sheet and overlap perfectly.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from micro_dit.diffusion.generate import Generator
from micro_dit.files import text_table
from micro_dit.models.config import DiTConfig
from micro_dit.models.flops import training_flops
from micro_dit.parallel.mesh import batch_shards, make_mesh, replicated
from micro_dit.parallel.sharding import bytes_per_device, shardings_of
from micro_dit.planning.aot import Compiled, Topology, abstract_train_step, compile_ahead
from micro_dit.planning.chips import Chip
from micro_dit.planning.collectives import Traffic
from micro_dit.planning.mxu_padding import MATRIX_UNITS, padding
from micro_dit.training.phases import Phase
from micro_dit.training.recipe import Recipe
from micro_dit.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Target:
    """The hardware to compile for, and how.

    Attributes:
        topology: The described devices, as in `mesh`.
        chip: Data sheet of one of them.
        optimization, cache: As for `compile_ahead`. With a cache a killed rehearsal can be resumed.
        say: Prints a line of progress.
    """

    topology: Topology
    chip: Chip
    mesh: jax.sharding.Mesh
    optimization: str = "default"
    cache: Path | None = None
    say: Callable[[str], None] = lambda text: None

    def compile(self, title: str, function: Callable[..., Any], arguments: Sequence[Any], **options: Any) -> Compiled:
        """Compiles a function and prints a heartbeat; `options` are those of `compile_ahead`."""
        self.say(title)
        return compile_ahead(
            function, arguments, self.topology, optimization=self.optimization, cache=self.cache,
            progress=lambda seconds: self.say(f"{title} … {seconds:.0f} s"), **options,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """The requirements of a phase. Bytes, seconds and FLOPs of `step` and `sampler` are those of one chip.

    Attributes:
        parameters: Parameters of the network.
        state_bytes: Bytes of parameters, optimizer state and EMA weights on one chip.
        batch_size, microbatch: Images per step and per pass, over all chips.
        step, sampler: The compiled training step, and the compiled sampler of `sampler_images` images.
        flops: FLOPs of a step of the network on all chips, by formula.
        compiler_flops: FLOPs of a step on all chips as the compiler counts them, recomputed activations and all that is
            no matrix product included; for GPUs, whose compiler counts none, those of the program that it is given.
        padding: Share of padding in the work of a TPU's matrix units; it is not in `compute`.
        compute, memory, interconnect: The least seconds that a step needs for each.
        hours, dollars: Hours and dollars of the phase at that speed; dollars are None where no price is known.
        suggestion: What to change if the step does not fit.
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
        """Seconds of a step: the slowest of compute, memory and interconnect."""
        return max(self.compute, self.memory, self.interconnect)

    def to_json(self) -> dict[str, Any]:
        """Returns all fields, with the peaks and speeds that follow from them."""
        peaks = {"peak_bytes": self.step.peak, "sampler_peak_bytes": self.sampler.peak}
        derived = {"seconds_per_step": self.seconds, "images_per_second": self.batch_size / self.seconds}
        return dataclasses.asdict(self) | peaks | derived


def rehearse_phases(
    phases: Sequence[Phase], networks: Sequence[DiTConfig], recipe: Recipe, text_tokens: int, target: Target,
    sampler_images: int, guided: bool, price: float | None,
) -> list[Rehearsal]:  # fmt: skip
    """Compiles the training step and the sampler of each phase.

    The sampler computes `sampler_images` at once, with guidance if `guided`. `price` is in dollars per chip-hour.

    Raises:
        UserError: A batch cannot be split over the devices.
    """
    samplers: dict[DiTConfig, Compiled] = {}
    rehearsals = []
    for phase, network in zip(phases, networks, strict=True):
        recipe.check_batch(phase, target.mesh)
        step, microbatch, suggestion = _fit(network, phase, recipe, text_tokens, target)
        state = abstract_train_step(network, phase, recipe, target.mesh, text_tokens)[1]
        if network not in samplers:  # parameters are where they are, the prompts on every chip, as for previews
            everywhere = replicated(target.mesh)
            generator = Generator(network, sigma_data=recipe.sigma_data, dtype=recipe.dtype, sharding=everywhere)
            denoise, arguments = generator.abstract_denoise(
                state.params, sampler_images, text_tokens, everywhere, guided=guided
            )
            title = f"compiling the sampler of phase {phase.name}"
            samplers[network] = target.compile(title, denoise, arguments, out_shardings=everywhere)
        sampler = samplers[network]
        per_image = float(training_flops(network, phase.mask_ratio, text_tokens, phase.mask_position))
        before_optimization = 0.0 if step.flops else _flops_before_optimization(network, phase, recipe, text_tokens)
        flops = per_image * phase.batch_size
        bounds = _roofline(step, phase.batch_size // microbatch, flops, before_optimization, target)
        hours = phase.steps * max(bounds["compute"], bounds["memory"], bounds["interconnect"]) / 3600
        rehearsals.append(
            Rehearsal(
                phase=phase.name, parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
                state_bytes=bytes_per_device(state, shardings_of(state)), batch_size=phase.batch_size,
                microbatch=microbatch, step=step, sampler=sampler, sampler_images=sampler_images, flops=flops,
                padding=_padding(network, phase, recipe, microbatch, text_tokens, target), **bounds, hours=hours,
                dollars=None if price is None else hours * target.topology.size * price,
                fits=not suggestion and sampler.peak <= target.chip.memory, suggestion=suggestion,
            )
        )  # fmt: skip
    return rehearsals


def _roofline(
    step: Compiled, passes: int, flops: float, before_optimization: float, target: Target
) -> dict[str, float]:
    """Returns the least seconds of a step for compute, memory and interconnect, and the FLOPs the compiler counts.

    `flops` are those of a step on all chips by formula, `before_optimization` those of the program before optimization,
    for compilers that count none. Those count the body of a loop once, so `passes` are the microbatches of a step.
    """
    chip, chips = target.chip, target.topology.size
    counted = (step.flops or before_optimization / chips) * passes
    # If the compiler reports no bytes: each argument is read, each result and temporary written, the latter read.
    accessed = step.bytes_accessed or step.arguments + step.outputs + 2 * step.temporaries
    sent = sum(traffic.sent for traffic in step.traffic.values())
    return {
        "compiler_flops": counted * chips,
        "compute": max(flops / chips, counted) / chip.peak_flops,
        "memory": accessed * passes / chip.bandwidth if chip.bandwidth else 0.0,
        "interconnect": sent / chip.interconnect if chip.interconnect else 0.0,
    }


def _fit(
    network: DiTConfig, phase: Phase, recipe: Recipe, text_tokens: int, target: Target
) -> tuple[Compiled, int, str]:
    """Returns the compiled step of a phase, its microbatch, and what to change if it does not fit (else '')."""
    mesh, chip = target.mesh, target.chip

    def compiled(microbatch: int) -> Compiled:
        at_once = f" in passes of {microbatch}" if microbatch < phase.batch_size else ""
        title = f"compiling phase {phase.name}: {phase.batch_size} images a step{at_once}"
        function, state, batch, key, out_shardings = abstract_train_step(
            network, phase, dataclasses.replace(recipe, microbatch=microbatch), mesh, text_tokens
        )
        found = target.compile(title, function, (state, batch, key), out_shardings=out_shardings, donate_argnums=(0,))
        memory = f"{found.peak / 1e9:.3g} of {chip.memory / 1e9:.3g} GB per chip"
        target.say(f"{title}: {memory}; took {found.seconds:.0f} s")
        return found

    asked = recipe.microbatch or phase.batch_size
    step = compiled(asked)
    if step.peak <= chip.memory:
        return step, asked, ""
    state: TrainState = abstract_train_step(network, phase, recipe, mesh, text_tokens)[1]
    held = bytes_per_device(state, shardings_of(state))
    gradients = bytes_per_device(state.params, shardings_of(state.params))
    shards = batch_shards(mesh)
    sizes = [n for n in range(shards, asked, shards) if phase.batch_size % n == 0]
    # Accumulation needs one more copy of the gradients.
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
    """Returns the largest microbatch whose peak is within the limit; 0 if there is none.

    The memory of a step beyond its state grows about in proportion to the microbatch. So the next one to compile is
    the largest within the limit on a line through two known ones. If none is, only the smallest is compiled as well.

    Args:
        sizes: Possible microbatches, ascending.
        peaks: Peak bytes by microbatch: known for one that is too large, estimated for 0. Results are added.
        limit: Bytes of memory.
        peak_of: Compiles a microbatch, which takes minutes, and returns its peak bytes.
    """
    fits, too_large, other = 0, max(peaks), 0  # `other` is known besides the smallest that is too large
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
    """Returns the FLOPs of a step on all chips together; the body of a loop is counted once."""
    one = make_mesh(devices=jax.devices()[:1])
    function, state, batch, key, _ = abstract_train_step(network, phase, recipe, one, text_tokens)
    return (jax.jit(function).lower(state, batch, key).cost_analysis() or {}).get("flops", 0.0)


def _padding(
    network: DiTConfig, phase: Phase, recipe: Recipe, microbatch: int, text_tokens: int, target: Target
) -> float | None:
    """Returns the share of padding in a pass with one chip's images; None if the chip is not a TPU.

    Widths are whole: the split over 'tensor' is not considered.
    """
    if target.topology.chip not in MATRIX_UNITS:
        return None
    phase = dataclasses.replace(phase, batch_size=microbatch // batch_shards(target.mesh))
    recipe, one = dataclasses.replace(recipe, microbatch=0), make_mesh(devices=jax.devices()[:1])
    function, state, batch, key, _ = abstract_train_step(network, phase, recipe, one, text_tokens)
    return padding(jax.make_jaxpr(function)(state, batch, key), target.topology.chip)


def rehearsal_table(rehearsals: Sequence[Rehearsal], topology: Topology, chip: Chip) -> str:
    """Returns the rehearsals as lines of text."""
    kinds = sorted({kind for rehearsal in rehearsals for kind in rehearsal.step.traffic})
    columns = [_column(rehearsal, kinds, topology, chip) for rehearsal in rehearsals]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    days, dollars = sum(r.hours for r in rehearsals) / 24, [r.dollars for r in rehearsals if r.dollars is not None]
    head = f"{topology}, {topology.size} chips; predicted for the phases together: at least {days:,.3g} days"
    if dollars and days:
        an_hour = sum(dollars) / (24 * days * topology.size)
        head += f" and ${sum(dollars):,.0f}, at ${an_hour:.2f} a chip-hour"
    return "\n".join([head, "", text_table(rows)])


def _column(r: Rehearsal, kinds: Sequence[str], topology: Topology, chip: Chip) -> dict[str, str]:
    """Returns the cells of a phase by the labels of their rows."""
    known = r.step.memory_limit is None
    return {
        "phase": r.phase, "parameters": f"{r.parameters:,}", "images a step": f"{r.batch_size:,}",
        "  in passes of": f"{r.microbatch:,}", f"GB per chip, of {chip.memory / 1e9:.1f}": "",
        "  arguments": f"{r.step.arguments / 1e9:.3g}" if known else "–",
        "  temporaries": f"{r.step.temporaries / 1e9:.3g}" if known else "–", "  peak": f"{r.step.peak / 1e9:.3g}",
        "  sampler's peak": f"{r.sampler.peak / 1e9:.3g}", "fits": "yes" if r.fits else "NO",
        "TFLOP per step, counted by hand": f"{r.flops / 1e12:,.3g}",
        "  by the compiler": f"{r.compiler_flops / 1e12:,.3g}",
        "padding of the products, on TPUs": "–" if r.padding is None else f"{r.padding:.1%}",
        "collectives per step, MB per chip": "", **{f"  {kind}": _of_kind(r.step.traffic.get(kind)) for kind in kinds},
        "ms per step, at least: compute": f"{1000 * r.compute:,.3g}", "  memory": f"{1000 * r.memory:,.3g}",
        "  interconnect": f"{1000 * r.interconnect:,.3g}", "images/s, at most": f"{r.batch_size / r.seconds:,.0f}",
        "days, at least": f"{r.hours / 24:,.3g}", "chip-hours, at least": f"{r.hours * topology.size:,.3g}",
        "dollars, at least": "–" if r.dollars is None else f"{r.dollars:,.0f}",
        "compiled in s": f"{r.step.seconds:,.0f}",
    }  # fmt: skip


def _of_kind(traffic: Traffic | None) -> str:
    """Describes collectives: their number, the mean of their MB, and how many overlap with other work."""
    if traffic is None:
        return "–"
    hidden = f", {traffic.hidden:,} hidden" if traffic.hidden else ""
    return f"{traffic.count:,} × {traffic.bytes / traffic.count / 1e6:,.3g}{hidden}"
