"""Measures how the cost of a training step scales with tokens, masking, batch size and experts.

    python -m benchmarks.growth --plot=docs/images/growth.png       a small network on one CPU thread: minutes
    python -m benchmarks.growth --gpu                               a wider network in bfloat16 on the first GPU

Varies one factor at a time, and compares the time of loss and gradients with the analytical FLOPs. The settings are
timed in turns; the results are medians of CPU seconds (user and system), or of wall seconds on a GPU. Then it measures
single parts of the network against the number of tokens, with the largest array that each creates. Only attention may
create one that grows with the square of the tokens.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from micro_dit.diffusion import edm
from micro_dit.models.config import DiTConfig, make_config
from micro_dit.models.dit import abstract_params, bind
from micro_dit.models.embeddings import position_table
from micro_dit.models.flops import training_flops
from micro_dit.models.layers import SwiGLU, attend
from micro_dit.models.masking import drop_tokens, random_mask, restore_tokens
from micro_dit.models.moe import ExpertChoiceFFN
from micro_dit.parallel.cpu import compiler_options, register_lowerings
from micro_dit.planning.mxu_padding import matrix_products, operations

CAPTION_TOKENS = 77
SIDES = (16, 24, 32, 48, 64)  # sides of the token grid: 256 to 4,096 tokens
VARIED: dict[str, tuple[int, ...]] = {
    "tokens": tuple(side**2 for side in SIDES),
    "tokens, unmasked": tuple(side**2 for side in SIDES),
    "tokens left after masking": (128, 256, 512, 1024),
    "images": (1, 2, 4, 8),
    "experts": (4, 8, 16, 32),
}


class Setting(NamedTuple):
    """One measured workload."""

    tokens: int = 1024
    kept: float = 0.25  # fraction of the tokens kept by masking
    images: int = 2
    experts: int = 8


class Timed(NamedTuple):
    """A compiled program with its arguments and analytical costs."""

    run: Callable[[], Any]
    flops: float
    largest: float = 0.0  # bytes of the largest array that it creates; 0 if not computed


def setting_of(factor: str, value: int) -> Setting:
    """Returns the setting with one factor at the given value, and the others at their defaults."""
    if factor == "tokens":
        return Setting(tokens=value)
    if factor == "tokens, unmasked":
        return Setting(tokens=value, kept=1.0, images=1)
    if factor == "tokens left after masking":
        return Setting(kept=value / Setting().tokens)
    return Setting()._replace(**{factor: value})


def network_of(setting: Setting, width: int) -> DiTConfig:
    """Returns a network with two mixer and three backbone blocks, each with one block of experts."""
    return make_config(
        "Nano", input_size=2 * math.isqrt(setting.tokens), depth=3, dim=width, patch_mixer_dim=width,
        head_dim=width // 2, caption_channels=64, num_experts=setting.experts,
    )  # fmt: skip


def flops_of(setting: Setting, width: int) -> float:
    """Returns the analytical FLOPs of loss and gradients."""
    return setting.images * training_flops(network_of(setting, width), 1 - setting.kept, CAPTION_TOKENS)


def position_table_of(tokens: int, width: int) -> Timed:
    """Returns the computation of the position table on the host, without its cache."""
    return Timed(lambda: position_table.__wrapped__(width, math.isqrt(tokens), 1.0), 0.0, 4.0 * tokens * width)


def step_of(setting: Setting, width: int, dtype: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns the loss and gradients of the network, including masking, and abstract arguments."""
    network, images = network_of(setting, width), setting.images

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        model, key = bind(network, params, jnp.dtype(dtype), "dots"), jax.random.key(0)
        mask = random_mask(key, images, network.tokens, 1 - setting.kept)
        sigma, noise = jnp.full((images,), 0.5), jax.random.normal(key, x.shape)
        return edm.loss(lambda x, t, y: model(x, t, y, mask), x, y, sigma, noise, mask=mask).mean()

    x = (images, network.input_size, network.input_size, network.in_channels)
    y = (images, CAPTION_TOKENS, network.caption_channels)
    inputs = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x, y))
    return jax.value_and_grad(loss), (abstract_params(network), *inputs)


def parts_of(width: int, dtype: str) -> dict[str, Callable[[int], tuple[Callable[..., Any], tuple[Any, ...]]]]:
    """Returns, by name, functions from a number of tokens to a part's forward and backward pass with its arguments."""
    layer: dict[str, Any] = dict(out_std=0.02, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    experts = ExpertChoiceFFN(width, 4 * width, experts=8, capacity=2.0, **layer)
    routing = ExpertChoiceFFN(width, 1, experts=8, capacity=2.0, **layer)  # width 1, so that the products have no cost
    dense = SwiGLU(width, 4 * width, use_bias=False, **layer)

    def drop_and_restore(x: jax.Array) -> jax.Array:
        mask = random_mask(jax.random.key(0), x.shape[0], x.shape[1], 0.75)
        assert mask is not None
        return restore_tokens(drop_tokens(x, mask) * 2, mask)

    def part(function: Callable[..., jax.Array], *lengths: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Returns the gradient with respect to inputs (2, length, width), and abstract inputs."""

        def loss(*inputs: jax.Array) -> jax.Array:
            return jnp.sum(function(*inputs).astype(jnp.float32) ** 2)

        inputs = tuple(jax.ShapeDtypeStruct((2, length, width), jnp.dtype(dtype)) for length in lengths)
        return jax.grad(loss, argnums=tuple(range(len(inputs)))), inputs

    L = CAPTION_TOKENS
    return {
        "attention": lambda N: part(lambda q, k, v: attend(q, k, v, 2), N, N, N),
        "attention to the caption": lambda N: part(lambda q, k, v: attend(q, k, v, 2), N, L, L),
        "dense feed-forward": lambda N: part(dense, N),
        "experts": lambda N: part(experts, N),
        "routing and dispatch alone": lambda N: part(routing, N),
        "masking: draw, drop, restore": lambda N: part(drop_and_restore, N),
    }


def cost(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[float, float]:
    """Returns FLOPs of the matrix products, and bytes of the largest array, in a function before compilation."""
    traced = jax.make_jaxpr(function)(*arguments)
    made = (variable.aval for operation, _ in operations(traced) for variable in operation.outvars)
    sizes = (math.prod(array.shape) * array.dtype.itemsize for array in made)
    return sum(product.flops for product in matrix_products(traced)), max(sizes, default=0)


def prepare(function: Callable[..., Any], arguments: Sequence[Any], flops: float = 0.0) -> Timed:
    """Compiles a function with random arguments; counts its cost if `flops` is not given."""
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(arguments))))
    filled = jax.tree.map(lambda leaf: 0.05 * jax.random.normal(next(keys), leaf.shape, leaf.dtype), arguments)
    register_lowerings()
    program = jax.jit(function, compiler_options=compiler_options()).lower(*arguments).compile()
    counted, largest = (flops, 0.0) if flops else cost(function, arguments)
    return Timed(lambda: program(*filled), counted, largest)


def medians(timed: Sequence[Timed], turns: int, clock: Callable[[], float]) -> list[float]:
    """Returns the median seconds of each program, after a warm-up run."""
    seconds: list[list[float]] = [[] for _ in timed]
    for turn in range(turns + 1):
        for program, taken in zip(timed, seconds, strict=True):
            runs, started = 0, clock()
            while not runs or (turn and clock() - started < 0.05):  # short programs run several times
                jax.block_until_ready(program.run())
                runs += 1
            if turn:
                taken.append((clock() - started) / runs)
    return [statistics.median(taken) for taken in seconds]


def exponents(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """Returns the slopes between neighboring points in a log-log plot; NaN where a value is zero."""
    pairs = zip(xs, xs[1:], ys, ys[1:], strict=False)
    return [math.log(y2 / y1) / math.log(x2 / x1) if y1 and y2 else math.nan for x1, x2, y1, y2 in pairs]


def curve(factor: str, values: Sequence[float], timed: Sequence[Timed], seconds: Sequence[float]) -> dict[str, Any]:
    """Returns measurements at several values of a factor, with the slopes between them."""
    found: dict[str, Any] = {"factor": factor, "values": list(values), "seconds": list(seconds)}
    for name in ("flops", "largest"):
        found[name] = [getattr(program, name) for program in timed]
    slopes = {f"{name}_exponents": exponents(values, found[name]) for name in ("seconds", "flops", "largest")}
    return found | slopes


def table(curves: Sequence[Mapping[str, Any]]) -> str:
    """Formats the measurements by factor, each followed by the slope from the previous value."""
    columns = (("seconds", 1e3, 10), ("flops", 1e-9, 10), ("largest", 1e-6, 12))
    lines = [f"{'':32}{'':>7}{'ms':>10}{'slope':>7}{'GFLOP':>10}{'slope':>7}{'largest MB':>12}{'slope':>7}"]
    for found in curves:
        for i, value in enumerate(found["values"]):
            line = f"{'' if i else found['factor']:32}{value:>7,}"
            for name, scale, width in columns:
                measure, slope = found[name][i] * scale, found[f"{name}_exponents"][i - 1] if i else math.nan
                line += f"{measure:>{width},.4g}" if measure else f"{'–':>{width}}"
                line += f"{'' if math.isnan(slope) else format(slope, '.2f'):>7}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def plot(steps: Sequence[Mapping[str, Any]], alone: Sequence[Mapping[str, Any]], path: Path, seconds: str) -> None:
    """Plots the step by factor, with the time predicted from FLOPs dashed, and its parts by tokens, to a .png file."""
    import matplotlib
    from matplotlib.figure import Figure

    from micro_dit.evaluation.isoflop import COLORS
    from micro_dit.images import PAPER, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.8), dpi=110, facecolor=PAPER, layout="constrained")
        tokens, factors, by_part = figure.subplots(1, 3)
        for panel, curves in ((tokens, steps[:2]), (factors, steps[2:]), (by_part, alone)):
            for found, color in zip(curves, (*COLORS, "#4a4a4a"), strict=False):
                panel.plot(found["values"], found["seconds"], "o-", color=color, markersize=3.5, label=found["factor"])
                if panel is not by_part:
                    per_flop = found["seconds"][-1] / found["flops"][-1]
                    panel.plot(found["values"], [per_flop * flops for flops in found["flops"]], "--", color=color)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.yaxis.set_minor_formatter(lambda value, _: "")
            bottom, top = panel.get_ylim()
            panel.set_ylim(bottom / 3, top * (100 if panel is by_part else 3))  # room for the legend
            panel.legend(fontsize=7, loc="upper left")
        tokens.set_ylabel(f"{seconds} of loss and gradients")
        tokens.set_xlabel("tokens; dashed: FLOPs, scaled to the last point")
        factors.set_xlabel("kept tokens, images or experts")
        by_part.set_xlabel("tokens; forward and backward of a single part")
        figure.savefig(path, facecolor=PAPER)


def main() -> int:
    parser = argparse.ArgumentParser(description="Times loss and gradients against tokens, masking, batch, experts.")
    parser.add_argument("--gpu", action="store_true", help="time a wide network in bfloat16 on the first GPU")
    parser.add_argument("--turns", type=int, default=5, help="timings of each setting; the median is used")
    parser.add_argument("--largest", type=int, default=4096, help="maximum number of tokens")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--plot", type=Path, help="file for the plot (.png)")
    arguments = parser.parse_args()

    if arguments.gpu and jax.default_backend() != "gpu":
        print(f"Skipped: JAX found no GPU, only {jax.devices()[0].device_kind}. See requirements.txt.")
        return 0
    if not arguments.gpu:
        jax.config.update("jax_platforms", "cpu")
        if hasattr(os, "sched_setaffinity"):  # before JAX starts its threads
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    width, dtype = (1024, "bfloat16") if arguments.gpu else (128, "float32")
    clock, seconds = (time.monotonic, "seconds") if arguments.gpu else (time.process_time, "CPU seconds")
    print(f"width {width}, {dtype}, {jax.devices()[0].device_kind}, jax {jax.__version__}, {seconds}, medians of "
          f"{arguments.turns}, load before {os.getloadavg()[0]:.1f}")  # fmt: skip

    varied = {
        factor: [value for value in values if not factor.startswith("tokens") or value <= arguments.largest]
        for factor, values in VARIED.items()
    }
    settings = dict.fromkeys(setting_of(factor, value) for factor, values in varied.items() for value in values)
    by_setting = {setting: prepare(*step_of(setting, width, dtype), flops_of(setting, width)) for setting in settings}
    taken = dict(zip(settings, medians(list(by_setting.values()), arguments.turns, clock), strict=True))
    steps = []
    for factor, values in varied.items():
        at = [setting_of(factor, value) for value in values]
        steps.append(curve(factor, values, [by_setting[setting] for setting in at], [taken[setting] for setting in at]))
    print(table(steps), flush=True)
    by_setting.clear()  # frees the programs' memory

    tokens = varied["tokens"]
    by_part = {name: [prepare(*part(N)) for N in tokens] for name, part in parts_of(width, dtype).items()}
    by_part["position table, on the host"] = [position_table_of(N, width) for N in tokens]
    alone = [curve(name, tokens, timed, medians(timed, arguments.turns, clock)) for name, timed in by_part.items()]
    print(table(alone))
    if arguments.json:
        arguments.json.write_text(json.dumps({"steps": steps, "parts": alone}, indent=2) + "\n")
    if arguments.plot:
        plot(steps, alone, arguments.plot, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
