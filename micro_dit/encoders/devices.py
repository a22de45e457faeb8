"""Data-parallel encoders: parameters are replicated, and batches are split over devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from micro_dit.errors import UserError

DTYPES = ("float32", "bfloat16")


class Devices:
    """The devices that an encoder runs on."""

    def __init__(self, dtype: str, sharding: Sharding | None):
        """Initializes the devices.

        Args:
            dtype: Dtype of matrix products, one of DTYPES.
            sharding: Sharding of batches; None for the default device.

        Raises:
            UserError: `dtype` is not supported.
        """
        if dtype not in DTYPES:
            raise UserError(f"Encoders do not support dtype '{dtype}'. Choose {' or '.join(DTYPES)}.")
        self.dtype = dtype
        self.count = 1 if sharding is None else len(sharding.device_set)
        self._batch = sharding
        self._whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding

    def replicate(self, parameters: Any) -> Any:
        """Copies parameters to every device."""
        return jax.device_put(parameters, self._whole)

    def compile(self, function: Callable[[Any, jax.Array], Any]) -> Callable[[Any, jax.Array | np.ndarray], Any]:
        """Returns `function(parameters, batch)` compiled for the devices, with replicated parameters.

        A batch that cannot be split evenly is padded with zeros, and the padding is removed from the results. Each new
        shape or dtype of the batch is compiled once.
        """

        def exact(parameters: Any, batch: jax.Array) -> Any:
            # By default a GPU multiplies float32 numbers as TF32, and a TPU as bfloat16.
            with jax.default_matmul_precision("highest" if self.dtype == "float32" else None):
                return function(parameters, batch)

        compiled = jax.jit(exact)

        def run(parameters: Any, batch: jax.Array | np.ndarray) -> Any:
            rows, missing = len(batch), -len(batch) % self.count
            if missing:
                pad = jnp.pad if isinstance(batch, jax.Array) else np.pad
                batch = pad(batch, [(0, missing)] + [(0, 0)] * (batch.ndim - 1))
            result = compiled(parameters, jax.device_put(batch, self._batch))
            return jax.tree.map(lambda array: array[:rows], result) if missing else result

        return run
