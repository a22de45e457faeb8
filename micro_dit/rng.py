"""Named random streams."""

import zlib

import jax


def stream(key: jax.Array, name: str, step: jax.Array | int | None = None) -> jax.Array:
    """Returns the key of a named random stream, folded with `step` if given; keys of other names or steps differ."""
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key if step is None else jax.random.fold_in(key, step)
