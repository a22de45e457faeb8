"""Runs with several processes: initialization, and communication between the processes.

Each process runs the same program on its own devices. Only process 0 writes files.
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
    """Connects to the other processes of the run; does nothing for a single process. Must run before JAX uses devices.

    Args:
        coordinator: Address of process 0 as host:port.
        process_index: Index of this process, from 0 to process_count - 1.
        process_count: Number of processes.
        cluster: Whether to detect these three values from the cluster although `launcher` finds no other processes.
        timeout_seconds: Time to wait for the other processes. After that, the process prints an error and exits with
            status 1.

    Raises:
        UserError: Only some of the three values are given, the cluster does not provide them, or the other processes
            are unreachable.
    """
    found = launcher(os.environ)
    if (coordinator, process_index, process_count) != (None, None, None):
        options = _explicit_options(coordinator, process_index, process_count)
        who = f"Process {process_index} of {process_count}"
        awaited = f"the other processes at {coordinator}" if process_index == 0 else f"process 0 at {coordinator}"
    elif found is None and not cluster:
        return
    else:
        gpus = _gpus_of_a_lone_task(os.environ)
        options = {"local_device_ids": list(range(gpus))} if gpus else {}
        who, awaited = f"A process of {found or 'the cluster'}", "the other processes of the job"
    try:
        with _exit_after(timeout_seconds, who, awaited):
            jax.distributed.initialize(initialization_timeout=2 * timeout_seconds + 60, **options)
    except ValueError as error:
        raise UserError(
            f"The other processes can't be detected from {found or 'the environment'} ({error}). Set --coordinator, "
            "--process_index and --process_count."
        ) from error
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{who} can't connect to {awaited}: {reason}. Check --coordinator and the network.") from error


def _explicit_options(coordinator: str | None, process_index: int | None, process_count: int | None) -> dict[str, Any]:
    """Returns the options of `jax.distributed.initialize` for the given values; raises UserError if one is invalid."""
    if coordinator is None or process_index is None or process_count is None:
        raise UserError("--coordinator, --process_index and --process_count must be set together.")
    if not 0 <= process_index < process_count:
        raise UserError(
            f"--process_index={process_index} is invalid. With --process_count={process_count} it must be from 0 to "
            f"{process_count - 1}."
        )
    if ":" not in coordinator:
        raise UserError(f"--coordinator={coordinator} has no port. Set it to host:port.")
    found = dict(coordinator_address=coordinator, num_processes=process_count, process_id=process_index)
    return found | {"cluster_detection_method": "deactivate"}


@contextlib.contextmanager
def _exit_after(seconds: int, who: str, awaited: str) -> Iterator[None]:
    """Prints one line and exits with status 1 if the context takes longer than `seconds`.

    JAX's own timeout aborts the process with a stack trace, which Python cannot catch, so this timeout must be shorter.
    """

    def give_up() -> None:
        print(
            f"error: {who} timed out after waiting {seconds} s for {awaited}. Check that all processes were started "
            "and can reach each other, or increase --timeout.", file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(1)

    watch = threading.Timer(seconds, give_up)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def launcher(environment: Mapping[str, str]) -> str | None:
    """Returns the name of the launcher that started several processes, detected from the environment; None if none."""
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
    """Returns the number of GPUs of a SLURM task that is the only one on its node, where JAX would use only one GPU."""
    lone = environment.get("SLURM_STEP_NUM_TASKS") == environment.get("SLURM_STEP_NUM_NODES")
    return int(environment.get("SLURM_GPUS_ON_NODE", 0)) if lone else 0


def main_first(action: Callable[[], T]) -> T:
    """Runs an action on process 0, and then on the other processes, which can read the files written by process 0.

    Raises:
        UserError: The action raised UserError on process 0. It is raised in every process, so that none keeps waiting.
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
    message = bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))).rstrip(b"\0").decode(errors="replace")
    if message:
        raise UserError(message)
    return result if main else action()


def gather(numbers: Sequence[int]) -> np.ndarray:
    """Returns the numbers of all processes, (processes, numbers) int32. All must call it at the same point."""
    ours = np.asarray(numbers, np.int32)
    return ours[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(ours))


def any_process(flag: bool) -> bool:
    """Returns whether the flag is set in any process. All must call it at the same point."""
    return bool(gather([flag]).any())
