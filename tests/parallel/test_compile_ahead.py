"""What is asked for is understood, or refused in one sentence; compiling is tested by tests/test_rehearse.py."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from micro_dit.errors import UserError
from micro_dit.parallel.compile_ahead import Topology

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("text", "size"), [("v5e:8x8", 64), ("v5p:4x4x4", 64), ("h100:8", 8), ("cpu:3", 3)])
def test_topologies(text: str, size: int):
    topology = Topology.parse(text)
    assert topology.size == size
    assert str(topology) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b200:8", "must be one of v5e, v5p"),
        ("v5e", "as in v5e:8x8"),
        ("v5e:4x4x4", "as in v5e:8x8"),
        ("v5p:8x8", "as in v5p:4x4x4"),
        ("h100:0", "as in h100:8"),
        ("h100:2x8", "as in h100:8"),
        ("h100:16", "8 GPUs of one host"),
    ],
)
def test_what_is_no_topology_is_refused(text: str, message: str):
    with pytest.raises(UserError, match=message):
        Topology.parse(text)


@pytest.mark.parametrize(
    ("topology", "module", "command"),
    [
        ("v5e:2x2", "libtpu", r"pip install 'micro_dit\[tpu-rehearsal\]'"),
        ("h100:8", "jax_plugins", "pip install --no-deps jax-cuda12-pjrt"),
    ],
)
def test_a_missing_compiler_is_named(topology: str, module: str, command: str):
    """In a process of its own: describing devices settles what jax runs on."""
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed")
    program = f"from micro_dit.parallel.compile_ahead import *; describe_devices(Topology.parse({topology!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 1
    assert re.search(command, done.stderr)
