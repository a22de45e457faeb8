"""Contenders that compute nothing, for tests of what is around them; see benchmarks/contenders.py."""

import os
import time
from typing import Any

from benchmarks.contenders import Setting
from micro_dit.errors import UserError


class Device:
    """Answers, sleeps, refuses or ends, as it is told."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def hello(self) -> dict[str, Any]:
        print("what libraries print is no answer")
        return {"device": "stand-in"}

    def threads(self) -> dict[str, Any]:
        return {"threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}

    def sleep(self, seconds: float) -> dict[str, Any]:
        time.sleep(seconds)
        return {}

    def refuse(self) -> dict[str, Any]:
        raise UserError("there is no room")

    def end(self) -> dict[str, Any]:
        os._exit(3)


class Training(Device):
    """A step of 0.1 seconds, that takes a second to compile."""

    def prepare(self) -> dict[str, Any]:
        return {"device": "NVIDIA H200", "compile_s": 1.0, "microbatch": self.setting.microbatch}

    def run(self, times: int) -> dict[str, Any]:
        return {"wall_s": 0.1, "cpu_s": 0.2, "peak_gb": 7.0}


class Sampling(Training):
    """Can't."""

    def prepare(self) -> dict[str, Any]:
        return self.refuse()
