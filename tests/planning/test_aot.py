"""Parsing of topologies, missing compilers, and the cache. tests/test_rehearse.py tests compilation."""

import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from micro_dit.errors import UserError
from micro_dit.planning.aot import Topology, compile_ahead

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("text", "size"), [("v5e:8x8", 64), ("v5p:4x4x4", 64), ("h100:8", 8), ("cpu:3", 3)])
def test_topologies_are_parsed(text: str, size: int) -> None:
    topology = Topology.parse(text)
    assert topology.size == size
    assert str(topology) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b200:8", "Use one of v5e, v5p"),
        ("v5e", "as in v5e:8x8"),
        ("v5e:4x4x4", "as in v5e:8x8"),
        ("v5p:8x8", "as in v5p:4x4x4"),
        ("h100:0", "as in h100:8"),
        ("h100:2x8", "as in h100:8"),
        ("h100:16", "8 GPUs of one host"),
    ],
)
def test_invalid_topologies_are_rejected(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Topology.parse(text)


@pytest.mark.parametrize(
    ("topology", "module", "extra"),
    [("v5e:2x2", "libtpu", "tpu-rehearsal"), ("h100:8", "jax_plugins", "gpu-rehearsal")],
)
def test_the_error_for_a_missing_compiler_names_the_extra(topology: str, module: str, extra: str) -> None:
    """Uses a separate process, because `describe_devices` sets the platform of JAX."""
    program = f"""
import sys
sys.modules[{module!r}] = None  # imports fail as if it were not installed
from micro_dit.planning.aot import Topology, UserError, describe_devices
try:
    describe_devices(Topology.parse({topology!r}))
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env={"PATH": ""})
    assert done.stdout.endswith(f"Run: pip install 'micro_dit[{extra}]'.\n"), done.stderr
    assert done.stdout.count("\n") == 1
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert extra in tomllib.load(file)["project"]["optional-dependencies"]


def test_cached_programs_are_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    x, topology, times = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=place), Topology("cpu", (1,)), []
    compile_it = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: times.append(1) or compile_it(lowered))
    first = compile_ahead(lambda x: x @ x, (x,), topology, cache=tmp_path / "new")
    assert (first.arguments, first.outputs) == (256, 256)
    assert first.flops >= 2 * 8**3
    assert compile_ahead(lambda x: x @ x, (x,), topology, cache=tmp_path / "new") == first
    assert len(times) == 1
    for different in (
        dict(function=lambda x: x @ x + 1), dict(optimization="O0"), dict(topology=Topology("cpu", (2,))),
        dict(donate_argnums=(0,)),
    ):  # fmt: skip
        given = dict(function=lambda x: x @ x, arguments=(x,), topology=topology, cache=tmp_path / "new") | different
        compile_ahead(**given)
    assert len(times) == 5
    assert len(list((tmp_path / "new").iterdir())) == 5
