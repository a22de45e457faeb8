"""Fake contenders that compute nothing, for tests of benchmarks/contenders.py."""

import os
import time
from typing import Any

from benchmarks.contenders import Setting
from micro_dit.errors import UserError


class Device:
    """A contender that answers, sleeps, fails or exits on request."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def hello(self) -> dict[str, Any]:
        print("not an answer, like the output of libraries")
        return {"device": "stand-in"}

    def threads(self) -> dict[str, Any]:
        return {"threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}

    def sleep(self, seconds: float) -> dict[str, Any]:
        time.sleep(seconds)
        return {}

    def fail(self) -> dict[str, Any]:
        raise UserError("Out of memory.")

    def end(self) -> dict[str, Any]:
        os._exit(3)


class Training(Device):
    """A fake training step that reports 0.1 seconds, and 1 second of compilation."""

    def prepare(self) -> dict[str, Any]:
        return {"device": "NVIDIA H200", "compile_s": 1.0, "microbatch": self.setting.microbatch}

    def run(self, times: int) -> dict[str, Any]:
        return {"wall_s": 0.1, "cpu_s": 0.2, "peak_gb": 7.0}


class Sampling(Training):
    """A fake sampler that fails."""

    def prepare(self) -> dict[str, Any]:
        return self.fail()
