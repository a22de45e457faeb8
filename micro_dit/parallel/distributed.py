"""Several processes as one: how they find each other, and what one of them does for all.

Each process runs the same program on its own devices. Only process 0 writes files that all share.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from micro_dit.errors import UserError

T = TypeVar("T")
LONGEST_MESSAGE = 4096  # bytes


def start(
    coordinator: str | None = None, process_index: int | None = None, process_count: int | None = None, *,
    cluster: bool = False, timeout_seconds: int = 300,
) -> None:  # fmt: skip
    """Joins the other processes of the run, before anything touches a device; does nothing for a single process.

    Args:
        coordinator: host:port at which the other processes reach process 0.
        process_index: Index of this process, 0 to process_count - 1.
        process_count: Number of processes.
        cluster: Whether to ask the cluster for the three above even if the environment shows no other processes.
        timeout_seconds: Seconds to wait for the other processes; then the process ends with a message and status 1.

    Raises:
        UserError: Only some of the three are given, the cluster doesn't provide them, or the others are unreachable.
    """
    found = launcher(os.environ)
    if (coordinator, process_index, process_count) != (None, None, None):
        options = _explicit_options(coordinator, process_index, process_count)
        who = f"process {process_index} of {process_count}"
        awaited = f"the others at {coordinator}" if process_index == 0 else f"process 0 at {coordinator}"
    elif found is None and not cluster:
        return
    else:
        gpus = _gpus_of_a_lone_task(os.environ)
        options = {"local_device_ids": list(range(gpus))} if gpus else {}
        who, awaited = f"a process of {found or 'the cluster'}", "the processes of the same job"
    try:
        with _exit_after(timeout_seconds, who, awaited):
            jax.distributed.initialize(initialization_timeout=2 * timeout_seconds + 60, **options)
    except ValueError as error:
        raise UserError(
            f"{found or 'the environment'} does not tell this process of any others ({error}); give --coordinator, "
            "--process_index and --process_count."
        ) from error
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{who} can't join {awaited}: {reason}; check --coordinator and the network.") from error


def _explicit_options(coordinator: str | None, process_index: int | None, process_count: int | None) -> dict[str, Any]:
    """Returns the options of `jax.distributed.initialize` for given processes; raises UserError if they are wrong."""
    if coordinator is None or process_index is None or process_count is None:
        raise UserError("--coordinator, --process_index and --process_count belong together: give all three.")
    if not 0 <= process_index < process_count or ":" not in coordinator:
        raise UserError(
            f"process {process_index} of {process_count} at {coordinator!r} is impossible: --process_index counts "
            "from 0 to --process_count - 1, and --coordinator is host:port."
        )
    found = dict(coordinator_address=coordinator, num_processes=process_count, process_id=process_index)
    return found | {"cluster_detection_method": "deactivate"}


@contextlib.contextmanager
def _exit_after(seconds: int, who: str, awaited: str) -> Iterator[None]:
    """Ends the process with one line and status 1 if the block takes longer than `seconds`.

    JAX's own time-out aborts the process with a stack trace, out of Python's reach, so this one has to come first.
    """

    def give_up() -> None:
        hint = "check that all of them were started and can reach each other."
        print(f"error: {who} waited {seconds} s for {awaited}, in vain; {hint}", file=sys.stderr, flush=True)
        os._exit(1)

    watch = threading.Timer(seconds, give_up)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def launcher(environment: Mapping[str, str]) -> str | None:
    """Returns what started this process as one of several, as far as the environment shows; None if nothing did."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return "SLURM"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or int(environment.get("MEGASCALE_NUM_SLICES", 1)) > 1:
        return "the TPU pod"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return None


def _gpus_of_a_lone_task(environment: Mapping[str, str]) -> int:
    """Returns the number of GPUs of a SLURM task that has its node for itself, to which JAX would give only one."""
    lone = environment.get("SLURM_STEP_NUM_TASKS") == environment.get("SLURM_STEP_NUM_NODES")
    return int(environment.get("SLURM_GPUS_ON_NODE", 0)) if lone else 0


def main_first(action: Callable[[], T]) -> T:
    """Runs an action on process 0, and then on the others, which find the files that process 0 has written.

    Raises:
        UserError: That of process 0, in every process, so that none waits for it in vain.
    """
    if jax.process_count() == 1:
        return action()
    main, message = jax.process_index() == 0, ""
    if main:
        try:
            result = action()
        except UserError as error:
            message = str(error)
    text = np.frombuffer(message.encode()[:LONGEST_MESSAGE].ljust(LONGEST_MESSAGE, b"\0"), np.uint8)
    said = bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))).rstrip(b"\0").decode(errors="replace")
    if said:
        raise UserError(said)
    return result if main else action()


def gather(numbers: Sequence[int]) -> np.ndarray:
    """Gathers numbers of all processes: (processes, numbers) int32. All must call it at the same point."""
    said = np.asarray(numbers, np.int32)
    return said[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(said))


def any_process(flag: bool) -> bool:
    """Returns whether the flag is set in any process. All must call it at the same point."""
    return bool(gather([flag]).any())
