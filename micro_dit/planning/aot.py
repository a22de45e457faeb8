"""Compiles a program for hardware that is not there, and tells what it would need there.

XLA compiles for a description of devices as well as for devices: libtpu describes TPU slices, and JAX's CUDA plugin
describes GPUs from a few figures; neither needs a driver or a chip. Fake CPU devices need nothing at all.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from micro_dit.errors import UserError
from micro_dit.files import hash_text, write_atomically
from micro_dit.models.config import DiTConfig
from micro_dit.parallel.cpu import compiler_options, register_lowerings
from micro_dit.parallel.mesh import batch_sharding, replicated
from micro_dit.parallel.sharding import shardings_of
from micro_dit.planning.collectives import Traffic, collectives
from micro_dit.training.phases import Phase
from micro_dit.training.recipe import Recipe
from micro_dit.training.state import TrainState
from micro_dit.training.step import abstract_train_state, make_train_step

TPUS = ("v5e", "v5p", "v6e")  # a v4 is described as two devices a chip, which share its memory: left out
GPUS = {"h100": "NVIDIA H100 80GB HBM3"}
CUDA_WHEELS = ("jax-cuda12-pjrt", "jax-cuda12-plugin")
# What XLA asks a GPU's driver for, as far as it is known of an H100; not compared with a real one yet.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 85000000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for: 'v5e:8x8' is 64 chips of a TPU slice, 'h100:8' one host, 'cpu:8' fake devices."""

    chip: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Raises UserError for what is no topology."""
        chip, _, sizes = text.partition(":")
        example = "4x4x4" if chip == "v5p" else "8x8" if chip in TPUS else "8"
        if chip not in (*TPUS, *GPUS, "cpu"):
            known = ", ".join((*TPUS, *GPUS, "cpu"))
            raise UserError(f"topology {text!r}: the chip must be one of {known}, as in v5e:8x8, v5p:4x4x4 or h100:8.")
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or sizes.count("x") != example.count("x"):
            raise UserError(f"topology {text!r}: give the chips along each side, as in {chip}:{example}.")
        shape = tuple(int(size) for size in sizes.split("x"))
        if chip in GPUS and shape[0] > 8:
            raise UserError(f"topology {text!r}: at most the 8 GPUs of one host can be described.")
        return cls(chip, shape)

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip}:{'x'.join(map(str, self.shape))}"


def describe_devices(topology: Topology) -> Sequence[Any]:
    """Returns a topology's devices. Call it before anything else of JAX: it makes this process run on its CPU.

    Raises:
        UserError: the package that describes them is missing, or knows no such slice.
    """
    jax.config.update("jax_platforms", "cpu")
    if topology.chip == "cpu":
        jax.config.update("jax_num_cpu_devices", topology.size)
        return jax.devices()
    jax.devices()  # or else a plugin would look for devices of its own
    from jax.experimental import topologies

    if topology.chip in TPUS:
        if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
            raise UserError(f"{topology} needs the TPU compiler: pip install 'micro_dit[tpu-rehearsal]'.")
        # What a TPU machine would be asked about itself, and libtpu complains of not being told: any will do.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it guards a chip, and there is none
        arguments: dict[str, Any] = dict(platform="tpu", topology_name=str(topology))
    else:
        if not all(importlib.util.find_spec(module) for module in ("jax_plugins", "jax_plugins.xla_cuda12")):
            raise UserError(f"{topology} needs XLA's compiler for GPUs: pip install 'micro_dit[gpu-rehearsal]'.")
        shape = f"1x1x{topology.size}"
        arguments = dict(platform="cuda", topology_name=topology.chip, target_config=H100, topology=shape)
    try:
        return topologies.get_topology_desc(**arguments).devices
    except Exception as error:
        raise UserError(f"{topology} can't be described: {str(error).splitlines()[0]}") from error


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program; all figures are of one device.

    Attributes:
        seconds: that compiling took.
        arguments, outputs, aliased, temporaries, code: bytes; what is aliased is output in the place of an argument.
        flops, bytes_accessed: that the compiler counts, with a loop's body counted once; None if it does not count.
        traffic: by kind of collective.
        memory_limit: bytes, if the compiler refused the program for needing more; all but `seconds` and `temporaries`
            (what it says the program needs) are then 0.
    """

    seconds: float
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    flops: float | None = None
    bytes_accessed: float | None = None
    traffic: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    memory_limit: int | None = None

    @property
    def peak(self) -> int:
        """Bytes of memory that the program needs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def abstract_train_step(
    network: DiTConfig, phase: Phase, recipe: Recipe, mesh: jax.sharding.Mesh, text_tokens: int
) -> tuple[Callable[..., Any], TrainState, dict[str, Any], Any, Any]:
    """Returns a phase's step, its abstract state, batch and key, and its out_shardings, without making an array.

    Raises:
        UserError: The run trains a LoRA adapter.
    """
    if recipe.lora:
        raise UserError("a LoRA run can't be rehearsed: set lora.rank 0, which needs more memory.")
    place, whole = batch_sharding(mesh), replicated(mesh)
    latents = (phase.batch_size, network.input_size, network.input_size, network.in_channels)
    captions = (phase.batch_size, text_tokens, network.caption_channels)
    shapes = {"latent_mean": latents, "latent_std": latents, "caption": captions}
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.float16, sharding=place) for name, shape in shapes.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    state = abstract_train_state(network, phase, recipe, mesh)
    return make_train_step(network, phase, 0, recipe, mesh), state, batch, key, (shardings_of(state), whole)


@contextlib.contextmanager
def heartbeat(beat: Callable[[float], object], every: float) -> Iterator[None]:
    """Calls `beat` every `every` seconds with the seconds that have passed, from a thread of its own."""
    started, done = time.monotonic(), threading.Event()

    def run() -> None:
        while not done.wait(every):
            beat(time.monotonic() - started)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def compile_ahead(
    function: Callable[..., Any], arguments: Sequence[Any], topology: Topology, *, optimization: str = "default",
    cache: Path | None = None, progress: Callable[[float], None] = lambda seconds: None, **options: Any,
) -> Compiled:  # fmt: skip
    """Compiles a function for the devices that its arguments' shardings name.

    Args:
        function: Function to be jitted.
        arguments: Pytrees of ShapeDtypeStructs with shardings on devices of `describe_devices`.
        topology: The topology of these devices.
        optimization: 'default', or 'O0', which is several times faster and finds nearly the same memory.
        cache: Folder that keeps the results, so that no program is compiled twice.
        progress: Called every few seconds with the seconds that have passed.
        options: Further options of `jax.jit`.
    """
    started = time.monotonic()
    xla: dict[str, Any] = {}
    if topology.chip == "cpu":
        register_lowerings()
        xla = compiler_options() | ({"xla_backend_optimization_level": "0"} if optimization == "O0" else {})
    if topology.chip in GPUS:
        # Without a GPU nothing can be timed, and what Triton would generate is chosen by timing.
        xla = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
    lowered = jax.jit(function, compiler_options=xla, **options).lower(*arguments)
    known = cache and cache / f"{_fingerprint(lowered, topology, optimization, xla)}.json"
    if known and known.exists():
        kept = json.loads(known.read_text())
        return Compiled(**kept | {"traffic": {kind: Traffic(**sums) for kind, sums in kept["traffic"].items()}})
    settings: Any = jax.config
    level = settings.jax_optimization_level
    try:
        if optimization == "O0":
            settings.update("jax_optimization_level", "O0")
        with heartbeat(progress, 10):
            program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", str(error))
        if used is None:
            raise
        needed, limit = _bytes(used[1], used[2]), _bytes(used[3], used[4])
        found = Compiled(time.monotonic() - started, temporaries=needed, memory_limit=limit)
    else:
        found = _read(program, topology, time.monotonic() - started)
    finally:
        settings.update("jax_optimization_level", level)
    if known:
        write_atomically(known, json.dumps(dataclasses.asdict(found)))
    return found


def _read(program: Any, topology: Topology, seconds: float) -> Compiled:
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    return Compiled(
        seconds=seconds, arguments=memory.argument_size_in_bytes, outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes, temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes, flops=cost.get("flops"), bytes_accessed=cost.get("bytes accessed"),
        traffic=collectives(program.as_text() or "", topology.size),
    )  # fmt: skip


def _fingerprint(lowered: Any, topology: Topology, optimization: str, options: Any) -> str:
    """Hashes a program, what it is compiled for, by what, and the code that reads the result."""
    reader = inspect.getsource(inspect.getmodule(collectives) or collectives)
    about = json.dumps([str(topology), optimization, options, compiler_versions(topology), reader], sort_keys=True)
    return hash_text(about + lowered.as_text())[:32]


def compiler_versions(topology: Topology) -> dict[str, str]:
    """Returns the packages that compile for a topology, and their versions."""
    plugin = ["libtpu"] if topology.chip in TPUS else list(CUDA_WHEELS) if topology.chip in GPUS else []
    # A library that TPU_LIBRARY_PATH names has no version.
    found = {name: importlib.metadata.distributions(name=name) for name in ("jax", "jaxlib", *plugin)}
    return {name: next((package.version for package in packages), "unknown") for name, packages in found.items()}


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))
