"""Runs each implementation of a benchmark in a separate process, so that JAX and PyTorch share no threads or memory.

A contender is a class in benchmarks/jax_jobs.py or benchmarks/torch_jobs.py. Its process creates one instance, reads
lines with a method name and arguments from standard input, and answers each with a line of JSON. It sleeps in between,
so contenders can take turns on the same cores.
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
GUIDANCE = 5.0  # guidance scale of the samplers
NARROW_EXPERTS = 16  # hidden width at which the dispatch dominates the cost of an expert layer
INSTALL_TORCH = "Skipping the PyTorch twin: torch is not installed. Run `pip install torch`."


@dataclasses.dataclass(frozen=True)
class Setting:
    """The workload of a comparison, equal for all contenders.

    Attributes:
        size: Name of the network size.
        fields: Overrides of the network's configuration.
        mask_ratio: Fraction of the tokens that is dropped.
        batch_size: Images per training step, or images sampled at once.
        microbatch: Images per forward and backward pass, halved until it fits on a GPU; 0 uses the whole batch.
        dtype: Dtype of matrix products.
        remat: Rematerialization policy of micro_dit's backward pass.
        caption_tokens: Number of caption tokens L.
        compiled: Whether the twin uses torch.compile.
        steps: Number of sampler steps.
        gpu: Whether to run on a GPU instead of the CPU.
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
    """Raised if a contender did not answer in time; its process has been killed."""


class Failed(Exception):
    """Raised if a contender cannot do what it was asked; the message is the reason."""


class Contender:
    """A contender's process, seen from the parent.

    Args:
        job: The class, such as "benchmarks.torch_jobs.Training".
        setting: Argument of the class.
        threads: Number of CPU threads.
        cache: Folder for compiled code; use an empty one to measure first compilations. Without it, JAX caches nothing,
            and torch.compile uses its default cache, because its C++ compiler takes minutes on a CPU.
    """

    def __init__(self, job: str, setting: Setting, threads: int, cache: str | None = None) -> None:
        own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        own["OMP_WAIT_POLICY"] = "PASSIVE"  # idle threads sleep, so that they use no CPU time
        # The twin imports JAX for the network sizes only, so JAX must not allocate GPU memory in its process.
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
        """Starts a method of the contender; `answer` waits for the result."""
        try:
            print(json.dumps([method, arguments]), file=self.input, flush=True)
        except BrokenPipeError:
            raise Failed(f"{self.job} exited with status {self.process.wait()}.") from None

    def answer(self, deadline: float | None = None) -> dict[str, Any]:
        """Waits for the result of the method started last, and returns it.

        Args:
            deadline: Value of time.monotonic() until which to wait.

        Raises:
            OutOfTime: The result did not arrive before the deadline.
            Failed: The contender reported an error, or its process has ended.
        """
        remaining = None if deadline is None else max(deadline - time.monotonic(), 0)
        if not select.select([self.output], [], [], remaining)[0]:
            self.close(kill=True)
            raise OutOfTime(f"{self.job} did not finish in time.")
        line = self.output.readline()
        if not line:
            raise Failed(f"{self.job} exited with status {self.process.wait()}.")
        answer = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def ask(self, method: str, deadline: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Starts a method and waits for its result."""
        self.start(method, **arguments)
        return self.answer(deadline)

    def close(self, kill: bool = False) -> None:
        """Ends the process."""
        if kill:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.input.close()
        self.process.wait()
        self.output.close()


def serve(job: str, setting: Setting) -> None:
    """Runs a contender's process; redirects prints of libraries to standard error, so that stdout has only answers."""
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
    """Returns whether PyTorch is installed, and prints a hint if it is not."""
    if importlib.util.find_spec("torch"):
        return True
    print(INSTALL_TORCH)
    return False


def cpu_seconds() -> float:
    """Returns user and system seconds of this process and of the child processes it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def describe_machine() -> dict[str, Any]:
    """Returns the hardware, load and package versions of a benchmark, without initializing a device."""
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
