"""The devices as a grid with four named axes, and how a batch is split over it.

    data    devices that share a batch, each with a full copy of the parameters
    fsdp    devices that share a batch and the parameters
    expert  devices that share a batch and the experts
    tensor  devices that share each matrix product of the same images

Which parameter is split over which axis is the table in sharding.py.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from micro_dit.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # a batch is split over all of these


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with the axes of AXES, by default of all devices of all processes on the axis 'data'.

    Axes that `sizes` doesn't name have size 1. One size may be -1, which takes the devices that the others leave.

    Raises:
        UserError: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict.fromkeys(AXES, 1) | dict({"data": -1} if sizes is None else sizes)
    asked = " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "1"
    if unknown := sorted(set(sizes) - set(AXES)):
        raise UserError(f"mesh has no axis {', '.join(unknown)}; the axes are {', '.join(AXES)}.")
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"the mesh is {asked}: each size must be at least 1, and only one may be -1, the rest.")
    if rest:
        sizes[rest[0]] = len(devices) // math.prod(size for size in sizes.values() if size != -1)
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"the mesh is {asked}, which does not take exactly the {len(devices)} devices there are "
            f"({devices[0].device_kind}); set one size to the rest, such as --config.mesh.data=-1."
        )
    # Auto: the compiler propagates shardings. With explicit axes each reshape that splits the batch would need its own.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension split over all axes that share a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(mesh: Mesh, batch_size: int, name: str) -> None:
    """Raises UserError if a batch of this size can't be split evenly."""
    if batch_size < 1 or batch_size % batch_shards(mesh):
        parts = f"{batch_shards(mesh)} parts that the mesh splits a batch into ({' × '.join(BATCH_AXES)})"
        raise UserError(f"{name} is {batch_size}, which is not a multiple of the {parts}; change one.")


def share_of_batch(mesh: Mesh) -> tuple[int, int]:
    """Returns which share of each batch this process reads, and how many shares there are.

    Processes whose devices hold the same rows, as along 'tensor', have the same share. Shares are counted by the first
    row, so that the shares one after another are the batch wherever a process's devices are neighbors in the mesh.

    Raises:
        UserError: Some processes would share only a part of their rows.
    """
    shards = batch_shards(mesh)
    rows: dict[int, set[int]] = {}
    where: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((shards,))
    for device, (row,) in where.items():
        rows.setdefault(device.process_index, set()).add(row.start or 0)
    shares = sorted({tuple(sorted(of_process)) for of_process in rows.values()})
    if sum(map(len, shares)) != shards or len({len(share) for share in shares}) != 1:
        raise UserError(
            f"the mesh {dict(mesh.shape)} would give some processes partly the same images; make each of its sizes a "
            "multiple or a divisor of a process's devices."
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def to_device(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This process's rows of a batch as global arrays, split over the mesh.

    On a CPU they are waited for: only a step whose arguments are all there runs in the thread that asks for it, and so
    keeps its memory (see `micro_dit.parallel.cpu.keep_memory`).
    """
    sharding, shares = batch_sharding(mesh), share_of_batch(mesh)[1]
    arrays = {
        name: jax.make_array_from_process_local_data(sharding, value, (len(value) * shares, *value.shape[1:]))
        for name, value in batch.items()
    }
    return jax.block_until_ready(arrays) if jax.default_backend() == "cpu" else arrays
