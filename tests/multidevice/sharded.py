"""Run by test_sharded.py in a separate process with 8 fake devices; prints the results as JSON."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from micro_dit.errors import UserError
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import abstract_params
from micro_dit.parallel import sharding
from micro_dit.parallel.cpu import compiler_options, register_lowerings
from micro_dit.parallel.mesh import AXES, batch_sharding, check_batch, make_mesh, replicated, to_device
from micro_dit.planning.aot import abstract_train_step
from micro_dit.training.lora import Trainable
from micro_dit.training.phases import Phase
from micro_dit.training.recipe import Recipe
from micro_dit.training.state import TrainState, init_state
from micro_dit.training.step import abstract_train_state
from tests.helpers import tiny

STEPS = 3
# The number of images on each device is a multiple of five, unlike all dimensions of parameters.
B = 80
# A large epsilon prevents Adam from dividing rounding errors by rounding errors.
PHASE = Phase(**tiny.MASKED | dict(batch_size=B, warmup_steps=0, ema_decay=0.9, learning_rate=1e-2))
# Two blocks, the first with experts. Without a mixer, compilation is faster.
NETWORK = tiny.network(use_patch_mixer=False)
PARAMS, DENSE = abstract_params(NETWORK), abstract_params(tiny.network(experts_every_n=9))
# The dense residual, trained with Muon and path drop.
FRUGAL = tiny.network(depth=1, patch_mixer_depth=1, decoder_depth=1, decoder_dim=32, fusion=True, rope=True)
MESHES = {"data": (8, 1, 1, 1), "fsdp": (1, 8, 1, 1), "experts": (2, 2, 2, 1), "tensor": (2, 1, 2, 2)}


def recipe(microbatch: int = 0, **fields: Any) -> Recipe:
    return Recipe(0.9, 0.1, "float32", "none", {"eps": 1e-3, "b2": 0.99}, microbatch, **fields)


def batch(step: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(step)
    shapes = {"latent_mean": (B, 8, 8, 4), "latent_std": (B, 8, 8, 4), "caption": (B, 4, 12)}
    return {name: np.abs(generator.standard_normal(shape)).astype(np.float16) for name, shape in shapes.items()}


def train(mesh: jax.sharding.Mesh, how: Recipe, network: DiTConfig = NETWORK) -> tuple[dict[str, Any], TrainState, str]:
    """Returns measurements, the final state on the host, and the compiled program as text."""
    function, *abstract, places = abstract_train_step(network, PHASE, how, mesh, 4)
    register_lowerings()
    step = jax.jit(function, donate_argnums=0, out_shardings=places, compiler_options=compiler_options())
    compiled = step.lower(*abstract).compile()
    params = tiny.random_params(network)
    state = TrainState(np.int32(0), params, how.optimizer(PHASE).init(params), jax.tree.map(np.copy, params))
    state = jax.device_put(state, places[0])
    key = jax.device_put(jax.random.key(0), replicated(mesh))
    metrics = []
    for number in range(STEPS):
        state, values = compiled(state, to_device(batch(number), mesh), key)
        metrics.append({name: float(value) for name, value in values.items()})
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    found = {
        "metrics": metrics,
        "held": held, "expected": sharding.bytes_per_device(
            (abstract[0].params, abstract[0].opt_state), (places[0].params, places[0].opt_state)
        ),
        "gathers": gathered_activations(compiled.as_text()),
    }  # fmt: skip
    if how.optimizer_name == "adamw":
        for part, arrays in (("expert", state.params), ("moment", state.opt_state[1].mu), ("average", state.ema)):
            found[part] = list(arrays["blocks.0.mlp.w1"].addressable_shards[0].data.shape)
    return found, jax.tree.map(np.asarray, state), compiled.as_text() or ""


def gathered_activations(program: str) -> list[str]:
    """Returns the all-gathers of a batch, whose gathered dimension is a multiple of five."""
    found = []
    for line in program.splitlines():
        if match := re.search(r"= (.*?) all-gather(?:-start)?\(.*?dimensions={(\d+)}", line):
            shapes = [[int(n) for n in dims.split(",")] for dims in re.findall(r"\[([\d,]+)\]", match[1])]
            if any(shape[int(match[2])] % 5 == 0 for shape in shapes):
                found.append(line.strip()[:300])
    return found


def fresh_state(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Initializes a state in its shards, and returns its bytes per device and the sums of its parameters."""
    abstract = abstract_train_state(NETWORK, PHASE, recipe(), mesh)
    state = init_state(Trainable(NETWORK), recipe().optimizer(PHASE), 0, sharding.shardings_of(abstract), with_ema=True)
    values = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.params)]
    return {
        "held": sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)),
        "sums": [float(np.abs(value).sum()) for value in values],
    }


def collectives(program: str) -> dict[str, int]:
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
    return {name: len(re.findall(rf" {name}(?:-start)?\(", program)) for name in names}


def error_of(check: Any) -> str:
    try:
        check()
    except UserError as error:
        return str(error)
    return ""


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Returns the norm of the difference over all arrays, relative to the norm of `theirs`."""
    squares = sum(np.sum((ours[n] - theirs[n]) ** 2, dtype=np.float64) for n in ours)
    return float(np.sqrt(squares / sum(np.sum(theirs[n] ** 2, dtype=np.float64) for n in ours)))


def main() -> None:
    alone = make_mesh({}, jax.devices()[:1])
    one, end, _ = train(alone, recipe())
    meshes = {name: make_mesh(dict(zip(AXES, sizes, strict=True))) for name, sizes in MESHES.items()}
    found: dict[str, Any] = {
        "one": one,
        "fresh": {"one": fresh_state(alone), "experts": fresh_state(meshes["experts"])},
    }
    start = jax.tree.map(np.asarray, tiny.random_params(NETWORK))
    for name, mesh, microbatch in [(*item, 0) for item in meshes.items()] + [("microbatch", meshes["experts"], 40)]:
        found[name], state, program = train(mesh, recipe(microbatch))
        moved, expected = ({n: params[n] - start[n] for n in start} for params in (state.params, end.params))
        found[name] |= {
            "params": difference(moved, expected),
            "moments": difference(state.opt_state[1].mu, end.opt_state[1].mu),
            "ema": difference(state.ema, end.ema),
            "collectives": collectives(program),
        }
    frugal = recipe(optimizer_name="muon", path_drop=0.3)
    found["frugal one"], end, _ = train(alone, frugal, FRUGAL)
    found["frugal"], state, _ = train(meshes["fsdp"], frugal, FRUGAL)
    start = jax.tree.map(np.asarray, tiny.random_params(FRUGAL))
    moved, expected = ({n: params[n] - start[n] for n in start} for params in (state.params, end.params))
    found["frugal"] |= {"params": difference(moved, expected), "ema": difference(state.ema, end.ema)}
    # Dropping tokens with broadcast indices gathers the batch, which `gathered_activations` must detect.
    over = batch_sharding(meshes["data"])
    take = jax.jit(lambda x, keep: x[jnp.arange(B)[:, None], keep], in_shardings=(over, over), out_shardings=over)
    arguments = jax.ShapeDtypeStruct((B, 16, 32), jnp.float32), jax.ShapeDtypeStruct((B, 4), jnp.int32)
    found["broadcast indices"] = gathered_activations(take.lower(*arguments).compile().as_text())
    eight = meshes["data"]
    found["errors"] = {
        "uneven": error_of(lambda: check_batch(eight, 12, "batch_size")),
        "fewer": error_of(lambda: make_mesh({"data": 4})),
        "two_rests": error_of(lambda: make_mesh({"data": -1, "fsdp": -1})),
        "unknown": error_of(lambda: make_mesh({"model": 2})),
        "experts": error_of(lambda: sharding.param_shardings(make_mesh({"expert": -1}), PARAMS)),
        "no_experts": error_of(lambda: sharding.param_shardings(make_mesh({"data": 4, "expert": 2}), DENSE)),
        "no_rule": error_of(lambda: sharding.param_shardings(eight, PARAMS | {"codebook": PARAMS["blocks.0.mlp.w1"]})),
        "microbatch": error_of(lambda: recipe(4).check_batch(PHASE, eight)),
        "microbatches": error_of(lambda: recipe(24).check_batch(PHASE, eight)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
