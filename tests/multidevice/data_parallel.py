"""Run by test_data_parallel.py in a process of its own with 8 fake devices; prints what it found as JSON."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny

from micro_dit.errors import UserError
from micro_dit.parallel import mesh as meshes
from micro_dit.train import Recipe, make_train_step
from micro_dit.training.phases import Phase
from micro_dit.training.state import TrainState

NETWORK = tiny.network()
PHASE = Phase(**tiny.MASKED | dict(batch_size=16, warmup_steps=0, ema_decay=0.9))
RECIPE = Recipe(sigma_data=0.9, caption_drop=0.1, dtype="float32", remat="dots", adam={})


def batch(step: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(step)
    shapes = {"latent_mean": (16, 8, 8, 4), "latent_std": (16, 8, 8, 4), "caption": (16, 4, 12)}
    return {name: np.abs(generator.standard_normal(shape)).astype(np.float16) for name, shape in shapes.items()}


def two_steps(mesh: jax.sharding.Mesh) -> tuple[list[dict[str, float]], dict[str, np.ndarray], str]:
    place = meshes.replicated(mesh)
    params = tiny.random_params(NETWORK)
    state = TrainState(jnp.int32(0), params, RECIPE.optimizer(PHASE).init(params), jax.tree.map(jnp.copy, params))
    state, key = jax.device_put(state, place), jax.device_put(jax.random.key(0), place)
    step = jax.jit(make_train_step(NETWORK, PHASE, 0, RECIPE), out_shardings=place)
    compiled = step.lower(state, meshes.to_device(batch(0), mesh), key).compile()
    metrics = []
    for number in range(2):
        state, values = compiled(state, meshes.to_device(batch(number), mesh), key)
        metrics.append({name: float(value) for name, value in values.items()})
    moved = {name: np.asarray(state.params[name]) - np.asarray(params[name]) for name in params}
    return metrics, moved, compiled.as_text()


def collectives(program: str) -> dict[str, int]:
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
    return {name: len(re.findall(rf" {name}(?:-start)?\(", program)) for name in names}


def gathering_by_hand(mesh: jax.sharding.Mesh) -> str:
    """What a drop of tokens must not be: rows taken by broadcast indices."""
    over = meshes.over_batch(mesh)
    take = jax.jit(lambda x, keep: x[jnp.arange(16)[:, None], keep], in_shardings=(over, over), out_shardings=over)
    arguments = jax.ShapeDtypeStruct((16, 16, 32), jnp.float32), jax.ShapeDtypeStruct((16, 4), jnp.int32)
    return take.lower(*arguments).compile().as_text()


def refusal(check: Any) -> str:
    try:
        check()
    except UserError as error:
        return str(error)
    return ""


def main() -> None:
    eight = meshes.make_mesh()
    one = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    metrics_one, moved_one, _ = two_steps(one)
    metrics_eight, moved_eight, program = two_steps(eight)
    difference = np.sqrt(sum(np.sum((moved_one[n] - moved_eight[n]) ** 2, dtype=np.float64) for n in moved_one))
    size = np.sqrt(sum(np.sum(moved_one[n] ** 2, dtype=np.float64) for n in moved_one))
    found = {
        "devices": eight.size, "one": metrics_one, "eight": metrics_eight, "difference": difference / size,
        "collectives": collectives(program), "by_hand": collectives(gathering_by_hand(eight)),
        "uneven": refusal(lambda: meshes.check_batch(eight, 12, "batch_size")),
        "fewer": refusal(lambda: meshes.make_mesh(4)),
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
