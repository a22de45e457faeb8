"""Compiles the training step and the sampler of a run for described chips, and derives memory, time and cost.

Nothing is allocated or executed. Times follow the roofline model: they are lower bounds, reached if compute, memory and
interconnect each achieve their specified peak and overlap perfectly.
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
    """The hardware to compile for, and the options of the compiler.

    Attributes:
        topology: The topology of the devices.
        chip: Specification of one device.
        mesh: Mesh of the devices.
        optimization, cache: See `compile_ahead`. With a cache, an interrupted rehearsal can be resumed.
        say: Prints a line of progress.
    """

    topology: Topology
    chip: Chip
    mesh: jax.sharding.Mesh
    optimization: str = "default"
    cache: Path | None = None
    say: Callable[[str], None] = lambda text: None

    def compile(self, title: str, function: Callable[..., Any], arguments: Sequence[Any], **options: Any) -> Compiled:
        """Compiles a function and prints a heartbeat; `options` are passed to `compile_ahead`."""
        self.say(title)
        return compile_ahead(
            function, arguments, self.topology, optimization=self.optimization, cache=self.cache,
            progress=lambda seconds: self.say(f"{title} … {seconds:.0f} s"), **options,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """The requirements of a phase. The figures in `step` and `sampler` are per chip.

    Attributes:
        phase: Name of the phase.
        parameters: Number of parameters of the network.
        state_bytes: Bytes of parameters, optimizer state and EMA weights on one chip.
        batch_size, microbatch: Images per step and per forward and backward pass, over all chips.
        step, sampler: The compiled training step, and the compiled sampler of `sampler_images` images.
        flops: FLOPs of a step on all chips, by formula.
        compiler_flops: FLOPs of a step on all chips as counted by the compiler, including recomputed activations and
            operations other than matrix products. XLA's GPU compiler reports none, so for GPUs they are counted before
            optimization.
        padding: Share of padding in the work of a TPU's matrix units, which `compute` does not include.
        compute, memory, interconnect: Lower bounds on the seconds of a step.
        hours, dollars: Lower bounds for the phase; dollars is None if the price is unknown.
        fits: Whether the step and the sampler fit in memory.
        suggestion: Change that makes the step fit, or ''.
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
        """Returns the lower bound on the seconds of a step, the maximum of compute, memory and interconnect."""
        return max(self.compute, self.memory, self.interconnect)

    def to_json(self) -> dict[str, Any]:
        """Returns all fields together with derived peak memory and speed."""
        peaks = {"peak_bytes": self.step.peak, "sampler_peak_bytes": self.sampler.peak}
        derived = {"seconds_per_step": self.seconds, "images_per_second": self.batch_size / self.seconds}
        return dataclasses.asdict(self) | peaks | derived


def rehearse_phases(
    phases: Sequence[Phase], networks: Sequence[DiTConfig], recipe: Recipe, text_tokens: int, target: Target,
    sampler_images: int, guided: bool, price: float | None,
) -> list[Rehearsal]:  # fmt: skip
    """Compiles the training step and the sampler of each phase.

    Args:
        phases: The phases.
        networks: Network of each phase.
        recipe: Settings that all phases share.
        text_tokens: Tokens per caption.
        target: The hardware to compile for.
        sampler_images: Batch size of the sampler.
        guided: Whether the sampler uses guidance.
        price: Dollars per chip-hour; None if unknown.

    Raises:
        UserError: A batch cannot be split over the devices.
    """
    samplers: dict[DiTConfig, Compiled] = {}
    rehearsals = []
    for phase, network in zip(phases, networks, strict=True):
        recipe.check_batch(phase, target.mesh)
        step, microbatch, suggestion = _fit(network, phase, recipe, text_tokens, target)
        state = abstract_train_step(network, phase, recipe, target.mesh, text_tokens)[1]
        if network not in samplers:  # as for previews, parameters keep their shardings and prompts are replicated
            everywhere = replicated(target.mesh)
            generator = Generator(network, sigma_data=recipe.sigma_data, dtype=recipe.dtype, sharding=everywhere)
            denoise, arguments = generator.abstract_denoise(
                state.params, sampler_images, text_tokens, everywhere, guided=guided
            )
            title = f"Compiling the sampler of phase {phase.name}"
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
    """Returns lower bounds on the seconds of a step by compute, memory and interconnect, and the compiler's FLOPs.

    Args:
        step: The compiled step.
        passes: Microbatches per step. The compiler counts the body of the loop over them only once.
        flops: FLOPs of a step on all chips, by formula.
        before_optimization: FLOPs of the program before optimization, for compilers that report none.
        target: The hardware.
    """
    chip, chips = target.chip, target.topology.size
    counted = (step.flops or before_optimization / chips) * passes
    # If the compiler reports no bytes, assume that each argument is read, each output is written, and each temporary is
    # written and read.
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
    """Returns the compiled step of a phase, its microbatch, and a change that makes it fit ('' if it already fits)."""
    mesh, chip = target.mesh, target.chip

    def compiled(microbatch: int) -> Compiled:
        passes = f" in microbatches of {microbatch}" if microbatch < phase.batch_size else ""
        title = f"Compiling phase {phase.name}: {phase.batch_size} images per step{passes}"
        function, state, batch, key, out_shardings = abstract_train_step(
            network, phase, dataclasses.replace(recipe, microbatch=microbatch), mesh, text_tokens
        )
        found = target.compile(title, function, (state, batch, key), out_shardings=out_shardings, donate_argnums=(0,))
        memory = f"{found.peak / 1e9:.3g} of {chip.memory / 1e9:.3g} GB per chip"
        target.say(f"{title}: {memory}, compiled in {found.seconds:.0f} s")
        return found

    microbatch = recipe.microbatch or phase.batch_size
    step = compiled(microbatch)
    if step.peak <= chip.memory:
        return step, microbatch, ""
    state: TrainState = abstract_train_step(network, phase, recipe, mesh, text_tokens)[1]
    held = bytes_per_device(state, shardings_of(state))
    gradients = bytes_per_device(state.params, shardings_of(state.params))
    shards = batch_shards(mesh)
    sizes = [n for n in range(shards, microbatch, shards) if phase.batch_size % n == 0]
    # Gradient accumulation requires an additional copy of the gradients.
    peaks = {0: float(held + gradients), microbatch: float(step.peak)}
    largest = largest_that_fits(sizes, peaks, chip.memory, lambda size: compiled(size).peak)
    if largest:
        return step, microbatch, f"set --config.microbatch={largest}, which requires {peaks[largest] / 1e9:.3g} GB"
    least = peaks[min(peaks.keys() - {0})] / 1e9
    return step, microbatch, (
        f"no microbatch fits, because a microbatch of {shards} images already requires {least:.3g} GB, including "
        f"{held / 1e9:.3g} GB for parameters, optimizer state and EMA weights; split these over more chips "
        "(--config.mesh.fsdp) or use chips with more memory"
    )  # fmt: skip


def largest_that_fits(
    sizes: Sequence[int], peaks: dict[int, float], limit: float, peak_of: Callable[[int], float]
) -> int:
    """Returns the largest microbatch whose peak memory is within the limit; 0 if there is none.

    The memory of a step beyond its state is about proportional to the microbatch. The next microbatch to compile is
    therefore the largest one that fits according to the line through two known points. If none fits according to the
    line, only the smallest one is compiled.

    Args:
        sizes: Candidate microbatches, ascending.
        peaks: Peak bytes by microbatch: known for one that is too large, and estimated for 0. Results are added.
        limit: Bytes of memory.
        peak_of: Compiles a microbatch, which may take minutes, and returns its peak bytes.
    """
    fits, too_large, other = 0, max(peaks), 0  # the line passes through `too_large` and `other`
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
    """Returns the FLOPs of a step on all chips before optimization; the body of a loop is counted once."""
    one = make_mesh(devices=jax.devices()[:1])
    function, state, batch, key, _ = abstract_train_step(network, phase, recipe, one, text_tokens)
    return (jax.jit(function).lower(state, batch, key).cost_analysis() or {}).get("flops", 0.0)


def _padding(
    network: DiTConfig, phase: Phase, recipe: Recipe, microbatch: int, text_tokens: int, target: Target
) -> float | None:
    """Returns the share of padding in a pass over the images of one chip; None if the chip is not a TPU.

    The split of widths over 'tensor' is not taken into account.
    """
    if target.topology.chip not in MATRIX_UNITS:
        return None
    phase = dataclasses.replace(phase, batch_size=microbatch // batch_shards(target.mesh))
    recipe, one = dataclasses.replace(recipe, microbatch=0), make_mesh(devices=jax.devices()[:1])
    function, state, batch, key, _ = abstract_train_step(network, phase, recipe, one, text_tokens)
    return padding(jax.make_jaxpr(function)(state, batch, key), target.topology.chip)


def rehearsal_table(rehearsals: Sequence[Rehearsal], topology: Topology, chip: Chip) -> str:
    """Returns the rehearsals as a text table with one column per phase."""
    kinds = sorted({kind for rehearsal in rehearsals for kind in rehearsal.step.traffic})
    columns = [_column(rehearsal, kinds, topology, chip) for rehearsal in rehearsals]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    days, dollars = sum(r.hours for r in rehearsals) / 24, [r.dollars for r in rehearsals if r.dollars is not None]
    head = f"{topology}, {topology.size} chips; lower bound for all phases: {days:,.3g} days"
    if dollars and days:
        price = sum(dollars) / (24 * days * topology.size)
        head += f" and ${sum(dollars):,.0f}, at ${price:.2f} per chip-hour"
    return "\n".join([head, "", text_table(rows)])


def _column(r: Rehearsal, kinds: Sequence[str], topology: Topology, chip: Chip) -> dict[str, str]:
    """Returns the cells of a phase by row label."""
    known = r.step.memory_limit is None
    return {
        "phase": r.phase, "parameters": f"{r.parameters:,}", "images per step": f"{r.batch_size:,}",
        "  microbatch": f"{r.microbatch:,}", f"GB per chip, of {chip.memory / 1e9:.1f}": "",
        "  arguments": f"{r.step.arguments / 1e9:.3g}" if known else "–",
        "  temporaries": f"{r.step.temporaries / 1e9:.3g}" if known else "–", "  peak": f"{r.step.peak / 1e9:.3g}",
        "  sampler's peak": f"{r.sampler.peak / 1e9:.3g}", "fits": "yes" if r.fits else "NO",
        "TFLOP per step, by formula": f"{r.flops / 1e12:,.3g}",
        "  by the compiler": f"{r.compiler_flops / 1e12:,.3g}",
        "padding in matrix units (TPU)": "–" if r.padding is None else f"{r.padding:.1%}",
        "collectives per step, MB per chip": "", **{f"  {kind}": _of_kind(r.step.traffic.get(kind)) for kind in kinds},
        "ms per step, at least: compute": f"{1000 * r.compute:,.3g}", "  memory": f"{1000 * r.memory:,.3g}",
        "  interconnect": f"{1000 * r.interconnect:,.3g}", "images/s, at most": f"{r.batch_size / r.seconds:,.0f}",
        "days, at least": f"{r.hours / 24:,.3g}", "chip-hours, at least": f"{r.hours * topology.size:,.3g}",
        "dollars, at least": "–" if r.dollars is None else f"{r.dollars:,.0f}",
        "compilation, s": f"{r.step.seconds:,.0f}",
    }  # fmt: skip


def _of_kind(traffic: Traffic | None) -> str:
    """Describes collectives of one kind: their number, their mean size in MB, and how many overlap with other work."""
    if traffic is None:
        return "–"
    hidden = f", {traffic.hidden:,} hidden" if traffic.hidden else ""
    return f"{traffic.count:,} × {traffic.bytes / traffic.count / 1e6:,.3g}{hidden}"
