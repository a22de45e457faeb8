"""The device mesh with four named axes, and how a batch is split over it.

    data    splits the batch; each device has a full copy of the parameters
    fsdp    splits the batch and the parameters
    expert  splits the batch and the experts
    tensor  splits matrix products; its devices process the same images

The table in sharding.py defines which parameter is split over which axis.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from micro_dit.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # the axes that a batch is split over


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with the axes in AXES.

    Args:
        sizes: Size of each axis; 1 if not given. One size may be -1 and is then inferred from the number of devices. By
            default, all devices are on the axis 'data'.
        devices: Devices of the mesh; by default all devices of all processes.

    Raises:
        UserError: An axis is unknown, or the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict.fromkeys(AXES, 1) | dict({"data": -1} if sizes is None else sizes)
    shape = " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "1"
    if unknown := sorted(set(sizes) - set(AXES)):
        raise UserError(f"mesh has no axis {', '.join(unknown)}. Its axes are {', '.join(AXES)}.")
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"mesh is {shape}, but each size must be at least 1. One size may be -1 and is then inferred from the "
            "number of devices."
        )
    if rest:
        sizes[rest[0]] = len(devices) // math.prod(size for size in sizes.values() if size != -1)
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh is {shape}, which does not match the {len(devices)} available devices ({devices[0].device_kind}). "
            "Set one size to -1, such as --config.mesh.data=-1, to infer it."
        )
    # With automatic axes, the compiler propagates shardings. With explicit axes, each reshape of the batch dimension
    # would need a sharding.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: the first dimension is split over BATCH_AXES."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(mesh: Mesh, batch_size: int, name: str) -> None:
    """Raises UserError, with `name` as the name of the batch size, if a batch can't be split evenly over the mesh."""
    if batch_size < 1 or batch_size % batch_shards(mesh):
        parts = f"{batch_shards(mesh)}, the number of parts that the mesh splits a batch into"
        raise UserError(
            f"{name} is {batch_size}, which is not a multiple of {parts} ({' × '.join(BATCH_AXES)}). Change the batch "
            "size or --config.mesh."
        )


def share_of_batch(mesh: Mesh) -> tuple[int, int]:
    """Returns the index of the share of each batch that this process reads, and the number of shares.

    Processes whose devices hold the same rows, as along 'tensor', have the same share. Shares are ordered by their
    first row. If the devices of each process are neighbors in the mesh, the concatenated shares are the batch.

    Raises:
        UserError: The shares of two processes overlap only partially.
    """
    shards = batch_shards(mesh)
    rows: dict[int, set[int]] = {}
    where: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((shards,))
    for device, (row,) in where.items():
        rows.setdefault(device.process_index, set()).add(row.start or 0)
    shares = sorted({tuple(sorted(of_process)) for of_process in rows.values()})
    if sum(map(len, shares)) != shards or len({len(share) for share in shares}) != 1:
        raise UserError(
            f"mesh is {dict(mesh.shape)}, with which the images of some processes would overlap partially. Set each "
            "size of --config.mesh to a multiple or a divisor of the number of devices per process."
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def to_device(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Returns global arrays, split over the mesh, from this process's rows of a batch.

    On a CPU, waits until the arrays are ready. Only then does a step run in the dispatching thread, which
    `micro_dit.parallel.cpu.keep_memory` requires.
    """
    sharding, shares = batch_sharding(mesh), share_of_batch(mesh)[1]
    arrays = {
        name: jax.make_array_from_process_local_data(sharding, value, (len(value) * shares, *value.shape[1:]))
        for name, value in batch.items()
    }
    return jax.block_until_ready(arrays) if jax.default_backend() == "cpu" else arrays
