"""Compiles programs ahead of time for devices that this machine does not have, and reports their requirements.

XLA can compile for a description of devices. libtpu describes TPU slices, and JAX's CUDA plugin describes GPUs from a
few figures; neither requires a driver or a chip. Fake CPU devices require no additional package.
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

TPUS = ("v5e", "v5p", "v6e")  # without v4, which is described as two devices per chip that share its memory
GPUS = {"h100": "NVIDIA H100 80GB HBM3"}
CUDA_WHEELS = ("jax-cuda12-pjrt", "jax-cuda12-plugin")
# The values that XLA queries from a GPU's driver, for an H100. They have not been compared with a real one.
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
    """Devices to compile for: 'v5e:8x8' is a TPU slice of 64 chips, 'h100:8' is one host, 'cpu:8' are fake devices.

    Attributes:
        chip: Name of the chip, one of TPUS, GPUS or 'cpu'.
        shape: Number of chips along each dimension.
    """

    chip: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Parses a topology such as 'v5e:8x8'; raises UserError if it is invalid."""
        chip, _, sizes = text.partition(":")
        example = "4x4x4" if chip == "v5p" else "8x8" if chip in TPUS else "8"
        if chip not in (*TPUS, *GPUS, "cpu"):
            known = ", ".join((*TPUS, *GPUS, "cpu"))
            raise UserError(
                f"--topology={text} has an unknown chip. Use one of {known}, for example --topology=v5e:8x8, v5p:4x4x4 "
                "or h100:8."
            )
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or sizes.count("x") != example.count("x"):
            raise UserError(
                f"--topology={text} must specify the number of chips along each dimension, as in {chip}:{example}."
            )
        shape = tuple(int(size) for size in sizes.split("x"))
        if chip in GPUS and shape[0] > 8:
            raise UserError(f"--topology={text} has more than the 8 GPUs of one host. Use at most {chip}:8.")
        return cls(chip, shape)

    @property
    def size(self) -> int:
        """Returns the number of devices."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip}:{'x'.join(map(str, self.shape))}"


def describe_devices(topology: Topology) -> Sequence[Any]:
    """Returns the devices of a topology.

    Restricts JAX to the CPU backend in this process, and must therefore be called before JAX is used.

    Raises:
        UserError: The package that describes the devices is not installed, or does not support the topology.
    """
    jax.config.update("jax_platforms", "cpu")
    if topology.chip == "cpu":
        jax.config.update("jax_num_cpu_devices", topology.size)
        return jax.devices()
    jax.devices()  # initializes the CPU backend, so that the plugin does not search for devices
    from jax.experimental import topologies

    if topology.chip in TPUS:
        if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
            raise UserError(
                f"--topology={topology} requires the TPU compiler. Run: pip install 'micro_dit[tpu-rehearsal]'."
            )
        # libtpu logs errors if a TPU machine does not set these variables. Their values do not matter here.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # the lock file protects a chip, which is not used
        arguments: dict[str, Any] = dict(platform="tpu", topology_name=str(topology))
    else:
        if not all(importlib.util.find_spec(module) for module in ("jax_plugins", "jax_plugins.xla_cuda12")):
            raise UserError(
                f"--topology={topology} requires XLA's GPU compiler. Run: pip install 'micro_dit[gpu-rehearsal]'."
            )
        shape = f"1x1x{topology.size}"
        arguments = dict(platform="cuda", topology_name=topology.chip, target_config=H100, topology=shape)
    try:
        return topologies.get_topology_desc(**arguments).devices
    except Exception as error:
        raise UserError(f"--topology={topology} is not supported: {str(error).splitlines()[0]}") from error


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's report on a program. All figures are per device.

    Attributes:
        seconds: Compilation time.
        arguments, outputs, aliased, temporaries, code: Bytes. Aliased outputs reuse the memory of arguments.
        flops, bytes_accessed: Counts of the compiler, in which the body of a loop is counted once; None if it reports
            none.
        traffic: Traffic by kind of collective.
        memory_limit: Bytes of device memory if the compiler rejected the program because it exceeds them. Then
            `temporaries` is the memory that the program requires, and all other figures except `seconds` are 0.
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
        """Returns the bytes of memory that the program requires."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def abstract_train_step(
    network: DiTConfig, phase: Phase, recipe: Recipe, mesh: jax.sharding.Mesh, text_tokens: int
) -> tuple[Callable[..., Any], TrainState, dict[str, Any], Any, Any]:
    """Returns the train step of a phase with abstract arguments; no array is allocated.

    Returns:
        The function, its abstract state, batch and key, and its out_shardings.

    Raises:
        UserError: The run trains a LoRA adapter.
    """
    if recipe.lora:
        raise UserError(
            f"lora.rank is {recipe.lora.rank}, but LoRA runs can't be rehearsed. Set --config.lora.rank=0, which "
            "requires more memory and is therefore an upper bound."
        )
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
    """Calls `beat` with the elapsed seconds every `every` seconds, from a background thread, until the context ends."""
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
    """Compiles a function for the devices in the shardings of its arguments.

    Args:
        function: The function to jit.
        arguments: Pytrees of ShapeDtypeStructs with shardings on devices of `describe_devices`.
        topology: The topology of these devices.
        optimization: 'default', or 'O0', which compiles several times faster and reports nearly the same memory.
        cache: Folder that caches the results, so that no program is compiled twice; None disables the cache.
        progress: Called every ten seconds with the elapsed seconds.
        options: Additional options of `jax.jit`.
    """
    started = time.monotonic()
    xla: dict[str, Any] = {}
    if topology.chip == "cpu":
        register_lowerings()
        xla = compiler_options() | ({"xla_backend_optimization_level": "0"} if optimization == "O0" else {})
    if topology.chip in GPUS:
        # Autotuning measures kernels on a GPU, and Triton's GEMM kernels are selected by autotuning.
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
    """Returns a hash of a program, its target, the compiler, and the code that reads the compiler's report."""
    reader = inspect.getsource(inspect.getmodule(collectives) or collectives)
    about = json.dumps([str(topology), optimization, options, compiler_versions(topology), reader], sort_keys=True)
    return hash_text(about + lowered.as_text())[:32]


def compiler_versions(topology: Topology) -> dict[str, str]:
    """Returns the versions of the packages that compile for a topology, by package name."""
    plugin = ["libtpu"] if topology.chip in TPUS else list(CUDA_WHEELS) if topology.chip in GPUS else []
    # A library set by TPU_LIBRARY_PATH has no package metadata, and its version is unknown.
    found = {name: importlib.metadata.distributions(name=name) for name in ("jax", "jaxlib", *plugin)}
    return {name: next((package.version for package in packages), "unknown") for name, packages in found.items()}


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))
