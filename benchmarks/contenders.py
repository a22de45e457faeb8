"""What the benchmarks compare, each in a process of its own, so that JAX's and PyTorch's threads and memory never meet.

A contender is a class of benchmarks/jax_jobs.py or benchmarks/torch_jobs.py. Its process makes one, waits for a line on
its standard input that names a method, and answers with a line that holds the result; in between it sleeps, so that
contenders can take turns on the same cores.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from micro_dit.errors import UserError

ROOT = Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "torch", "triton", "numpy")
GUIDANCE = 5.0  # of the samplers
NARROW_EXPERTS = 16  # so narrow are experts of which little is left but the dispatch
INSTALL_TORCH = "the PyTorch twin is left out: torch is not installed; pip install torch"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every contender of a comparison is given.

    Attributes:
        size: a row of the table of network sizes.
        fields: of the network, in place of that row's.
        mask_ratio: part of the tokens that is dropped.
        batch_size: images of a training step, or images sampled at once.
        microbatch: images of a forward and backward pass, halved until it fits a GPU; 0 takes the whole batch at once.
        dtype: of the matrix products.
        remat: what micro_dit's backward pass computes again.
        caption_tokens: L.
        compiled: whether the twin is compiled by torch.compile.
        steps: of the sampler.
        gpu: where it runs.
    """

    size: str
    fields: dict[str, Any]
    mask_ratio: float
    batch_size: int
    microbatch: int = 0
    dtype: str = "float32"
    remat: str = "dots"
    caption_tokens: int = 77
    compiled: bool = False
    steps: int = 30
    gpu: bool = False

    def network(self) -> Any:
        from micro_dit.models.config import make_config

        return make_config(self.size, **self.fields)


class OutOfTime(Exception):
    """A contender did not answer in time; it has been ended."""


class Failed(Exception):
    """A contender can't do what it was asked; the message is its reason."""


class Contender:
    """The parent's end of a contender's process.

    Args:
        job: the class, e.g. "benchmarks.torch_jobs.Training".
        setting: what the class is given.
        threads: of the CPU.
        cache: folder for compiled code, empty if compile seconds are to be those of a first time. Without it JAX keeps
            nothing, and torch.compile, whose C++ takes minutes on a CPU, what it keeps by default.
    """

    def __init__(self, job: str, setting: Setting, threads: int, cache: str | None = None) -> None:
        own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        own["OMP_WAIT_POLICY"] = "PASSIVE"  # threads without work sleep, or they would count as CPU seconds
        # JAX, which the twin imports for the sizes, must not take the GPU's memory there.
        own["JAX_PLATFORMS"] = "cuda,cpu" if setting.gpu and ".jax_jobs." in job else "cpu"
        own |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
        own["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        if cache:
            own |= {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch", "JAX_COMPILATION_CACHE_DIR": f"{cache}/jax"}
        else:
            own["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        command = [sys.executable, "-m", "benchmarks.contenders", job, json.dumps(dataclasses.asdict(setting))]
        self.job = job
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | own
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(kill=exception[0] is not None)

    def start(self, method: str, **arguments: Any) -> None:
        """Has the contender begin; `answer` waits for it."""
        try:
            print(json.dumps([method, arguments]), file=self.input, flush=True)
        except BrokenPipeError:
            raise Failed(f"{self.job} ended with status {self.process.wait()}") from None

    def answer(self, deadline: float | None = None) -> dict[str, Any]:
        """The result of what was started last.

        Args:
            deadline: of time.monotonic().

        Raises:
            OutOfTime: it was not there by then.
            Failed: the contender gives a reason why it can't, or has ended.
        """
        remaining = None if deadline is None else max(deadline - time.monotonic(), 0)
        if not select.select([self.output], [], [], remaining)[0]:
            self.close(kill=True)
            raise OutOfTime(f"{self.job} was not done in time")
        line = self.output.readline()
        if not line:
            raise Failed(f"{self.job} ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def ask(self, method: str, deadline: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Starts it and waits for the answer."""
        self.start(method, **arguments)
        return self.answer(deadline)

    def close(self, kill: bool = False) -> None:
        """Ends the process; it answers nothing any more."""
        if kill:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.input.close()
        self.process.wait()
        self.output.close()


def serve(job: str, setting: Setting) -> None:
    """The contender's end: what libraries print goes to standard error, answers alone to standard output."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = job.rpartition(".")
    worker = None
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            worker = worker or getattr(importlib.import_module(module), name)(setting)
            answer = getattr(worker, method)(**arguments)
        except UserError as error:
            answer = {"failed": str(error)}
        print(json.dumps(answer), file=channel, flush=True)


def twin_is_there() -> bool:
    """Whether PyTorch is installed; says so if not."""
    if importlib.util.find_spec("torch"):
        return True
    print(INSTALL_TORCH)
    return False


def cpu_seconds() -> float:
    """User and system seconds of this process and of the children it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def describe_machine() -> dict[str, Any]:
    """Where and with what the figures come about, without waking up any device."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    found = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **found},
    }


if __name__ == "__main__":
    serve(sys.argv[1], Setting(**json.loads(sys.argv[2])))
