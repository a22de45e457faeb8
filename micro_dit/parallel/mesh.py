"""Where arrays live: one mesh over all devices, the batch split over it, parameters on every device."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from micro_dit.errors import UserError


def make_mesh(data: int = -1) -> Mesh:
    """A mesh with the axis 'data' over `data` devices; -1 takes all of them.

    Raises:
        UserError: the devices at hand are fewer, or not all of them would be used.
    """
    devices = jax.devices()
    size = len(devices) if data == -1 else data
    if size != len(devices):
        raise UserError(
            f"mesh.data is {data}, but there are {len(devices)} devices ({devices[0].device_kind}); "
            "set --config.mesh.data=-1 to use them all."
        )
    # Auto: the compiler propagates shardings. With explicit axes each reshape that splits the batch would need its own.
    return jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device in full."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over the mesh."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(mesh: Mesh, batch_size: int, name: str) -> None:
    """Raises UserError if a batch of this size can't be split evenly."""
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(f"{name} is {batch_size}, which is no multiple of the mesh's {mesh.size} devices; change one.")


def to_device(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This process's rows of a batch as global arrays, split over the mesh."""
    sharding = over_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
