"""Named random streams."""

import zlib

import jax


def stream(key: jax.Array, name: str, step: jax.Array | int | None = None) -> jax.Array:
    """The key of a named random stream, at a step if one is given: independent of every other name and step."""
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key if step is None else jax.random.fold_in(key, step)
