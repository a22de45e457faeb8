"""Several processes as one: how they find each other, and what one of them does for all.

Each process runs the same program on its own devices. Only process 0 writes files that all share.
"""

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from micro_dit.errors import UserError

T = TypeVar("T")
LONGEST_MESSAGE = 4096  # bytes


def start(
    coordinator: str | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    *,
    cluster: bool = False,
    timeout_seconds: int = 300,
) -> None:
    """Joins the other processes of the run, before anything touches a device. Alone, there is nothing to do.

    Args:
        coordinator: host:port at which process 0 is reached by the others.
        process_index: of this process, 0 to process_count - 1.
        process_count: how many processes there are.
        cluster: ask the cluster for the three above, even if nothing in the environment tells of other processes.
        timeout_seconds: how long to wait for the others.

    Raises:
        UserError: only a part of the three is given, the cluster does not tell them, or they can't be reached. If the
            others do not come in time, the process ends with status 1 and a sentence that says who was waited for.
    """
    given = (coordinator, process_index, process_count)
    found = launcher(os.environ)
    if given == (None, None, None) and found is None and not cluster:
        return
    options: dict[str, object] = {}
    if given == (None, None, None):
        who = f"a process of {found or 'the cluster'}"
        awaited = "the processes of the same job"
        if gpus := _gpus_of_a_lone_task(os.environ):
            options["local_device_ids"] = list(range(gpus))
    else:
        if coordinator is None or process_index is None or process_count is None:
            raise UserError("--coordinator, --process_index and --process_count belong together: give all three.")
        if not 0 <= process_index < process_count or ":" not in coordinator:
            raise UserError(
                f"process {process_index} of {process_count} at {coordinator!r} is impossible: --process_index counts "
                "from 0 to --process_count - 1, and --coordinator is host:port."
            )
        who = f"process {process_index} of {process_count}"
        awaited = f"the others at {coordinator}" if process_index == 0 else f"process 0 at {coordinator}"
        options = dict(
            coordinator_address=coordinator, num_processes=process_count, process_id=process_index,
            cluster_detection_method="deactivate",
        )  # fmt: skip

    def give_up() -> None:
        print(
            f"error: {who} waited {timeout_seconds} s for {awaited}, in vain; check that all of them were started and "
            "can reach each other.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    # JAX's own time-out aborts the process with a stack trace, out of Python's reach. So ours comes first.
    watch = threading.Timer(timeout_seconds, give_up)
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(initialization_timeout=2 * timeout_seconds + 60, **options)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(
            f"{found or 'the environment'} does not tell this process of any others ({error}); give --coordinator, "
            "--process_index and --process_count."
        ) from error
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{who} can't join {awaited}: {reason}; check --coordinator and the network.") from error
    finally:
        watch.cancel()


def launcher(environment: Mapping[str, str]) -> str | None:
    """What started this process as one of several, as far as the environment tells."""
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
    """Under SLURM, JAX gives each process one GPU; a process that has a node for itself shall have all of them."""
    lone = environment.get("SLURM_STEP_NUM_TASKS") == environment.get("SLURM_STEP_NUM_NODES")
    return int(environment.get("SLURM_GPUS_ON_NODE", 0)) if lone else 0


def main_first(action: Callable[[], T]) -> T:
    """Does something on process 0, and when that is done, on the others, which find what process 0 has made.

    Raises:
        UserError: that of process 0, in every process, so that none waits for it in vain.
    """
    if jax.process_count() == 1:
        return action()
    main, message = jax.process_index() == 0, ""
    if main:
        try:
            result = action()
        except UserError as error:
            message = str(error)
    text = np.zeros(LONGEST_MESSAGE, np.uint8)
    encoded = message.encode()[:LONGEST_MESSAGE]
    text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    said = bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))).rstrip(b"\0").decode(errors="replace")
    if said:
        raise UserError(said)
    return result if main else action()


def gather(numbers: Sequence[int]) -> np.ndarray:
    """What every process says, (processes, numbers) int32. All must ask at the same point."""
    said = np.asarray(numbers, np.int32)
    return said[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(said))


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. All must ask at the same point."""
    return bool(gather([flag]).any())
