"""Detection of other processes from the environment. tests/multidevice/test_processes.py runs several processes."""

import pytest

from micro_dit.errors import UserError
from micro_dit.parallel.distributed import any_process, launcher, main_first, start

TPU = {"TPU_WORKER_HOSTNAMES": "10.0.0.2,10.0.0.3", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # the shell of a job, not a task started by srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        (TPU, "the TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "the TPU pod"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
    ],
)
def test_the_launcher_is_detected_from_the_environment(environment: dict[str, str], expected: str | None) -> None:
    assert launcher(environment) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 0, None), "must be set together"),
        (("host:1", 2, 2), "--process_index=2 is invalid. With --process_count=2 it must be from 0 to 1"),
        (("host", 0, 2), "--coordinator=host has no port"),
    ],
)
def test_invalid_flags_are_rejected(given: tuple[str, int, int | None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start(*given)


def test_a_single_process_does_not_communicate() -> None:
    assert main_first(lambda: 3) == 3
    assert any_process(True) is True
    assert any_process(False) is False
