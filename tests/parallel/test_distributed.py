"""What the environment tells of other processes; real ones are in tests/multidevice/test_processes.py."""

import pytest

from micro_dit.errors import UserError
from micro_dit.parallel.distributed import any_process, launcher, main_first, start

TPU = {"TPU_WORKER_HOSTNAMES": "10.0.0.2,10.0.0.3", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # a job's shell, not a task that srun started
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
def test_the_environment_tells_whether_there_are_others(environment: dict[str, str], expected: str | None) -> None:
    assert launcher(environment) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 0, None), "belong together: give all three"),
        (("host:1", 2, 2), "process 2 of 2 at 'host:1' is impossible"),
        (("host", 0, 2), "--coordinator is host:port"),
    ],
)
def test_impossible_flags_are_refused(given: tuple[str, int, int | None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start(*given)


def test_alone_there_is_nothing_to_wait_for() -> None:
    assert main_first(lambda: 3) == 3
    assert any_process(True) is True
    assert any_process(False) is False
