"""Specifications of accelerators, and a measurement of the CPU of this machine."""

import dataclasses
import re
import time

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Chip:
    """The specification of an accelerator.

    Attributes:
        name: Short name, a key of CHIPS.
        peak_flops: Peak dense bfloat16 FLOP/s (float16 on the T4, which has no bfloat16 units).
        memory: Bytes of device memory.
        bandwidth: Memory bandwidth in bytes/s.
        interconnect: Bytes/s that a chip can send to other chips of its slice or host, over all links together. Vendors
            publish twice this value, for both directions.
        price: List price in dollars per chip-hour, or None if there is no established one. Prices change, so set your
            own.
        device_kind: Regular expression that matches `jax.Device.device_kind`.
        source: Source of the figures.
    """

    name: str
    peak_flops: float
    memory: float
    bandwidth: float
    interconnect: float
    price: float | None
    device_kind: str
    source: str


# NVIDIA's data sheets list tensor-core figures "with sparsity"; the dense figures here are half of those. The PCIe and
# NVL variants of the H100 and H200 have lower peaks and are therefore not matched. The H100's price is that of the
# MicroDiT paper (8 × H100 for $30 per hour); other prices change too often to be listed. Google's figures are from its
# own pages (November 2026; for v6e they listed 1600 GB/s, before that 1640). NVIDIA's are from the pages listed, which
# are not NVIDIA's.
# fmt: off
_CHIPS = (
    #    name         FLOP/s  memory     bytes/s   links   price  device_kind
    Chip("h100",      989e12, 80e9,      3.35e12,  450e9,  3.75,  r"NVIDIA H100 80GB HBM3$",      "SXM; glennklockwood.com/garden/processors/h100"),  # noqa: E501
    Chip("h200",      989e12, 141e9,     4.8e12,   450e9,  None,  r"NVIDIA H200$",                "SXM; aiwiki.ai/wiki/nvidia_h200; links: MLPerf inference v4.1, NVIDIA's H200 system"),  # noqa: E501
    Chip("a100",      312e12, 40e9,      1.555e12, 300e9,  None,  r"NVIDIA A100.*40GB$",          "SXM; glennklockwood.com/garden/processors/A100, which cites NVIDIA's data sheet"),  # noqa: E501
    Chip("a100-80gb", 312e12, 80e9,      2.039e12, 300e9,  None,  r"NVIDIA A100.*80GB( PCIe)?$",  "SXM; glennklockwood.com/garden/processors/A100, which cites NVIDIA's data sheet"),  # noqa: E501
    Chip("l4",        121e12, 24e9,      300e9,    32e9,   None,  r"NVIDIA L4$",                  "grokipedia.com/page/NVIDIA_L4_vs_L40S; links: PCIe 4.0 x16"),  # noqa: E501
    Chip("t4",        65e12,  16e9,      320e9,    16e9,   None,  r"(NVIDIA )?(Tesla )?T4$",      "hmc-tech.com/gpu/nvidia-a16-vs-nvidia-t4; memory: PNY's manual of the T4; links: PCIe 3.0 x16"),  # noqa: E501
    Chip("v4",        275e12, 32 * 2**30, 1.2e12,  300e9,  None,  r"TPU v4$",                     "cloud.google.com/tpu/docs/v4; links: arXiv 2304.01433, 6 × 50 GB/s"),  # noqa: E501
    Chip("v5e",       197e12, 16e9,      819e9,    200e9,  None,  r"TPU v5( lite|e)$",            "cloud.google.com/tpu/docs/v5e"),  # noqa: E501
    Chip("v5p",       459e12, 95 * 2**30, 2.765e12, 600e9, None,  r"TPU v5p?$",                   "docs.cloud.google.com/tpu/docs/v5p-training"),  # noqa: E501
    Chip("v6e",       918e12, 32e9,      1.6e12,   400e9,  None,  r"TPU v6( lite|e)$",            "docs.cloud.google.com/tpu/docs/v6e"),  # noqa: E501
)
# fmt: on
CHIPS: dict[str, Chip] = {chip.name: chip for chip in _CHIPS}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip with this `jax.Device.device_kind`; None if it is not in the table, such as a CPU."""
    return next((chip for chip in CHIPS.values() if re.match(chip.device_kind, device_kind)), None)


def measure_chip(seconds: float = 0.3) -> Chip:
    """Returns this machine as a Chip named "cpu", with a peak measured by float32 matrix products for `seconds`."""
    side = 1024
    a = jnp.ones((side, side), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    best, until = float("inf"), time.monotonic() + seconds
    while time.monotonic() < until:
        started = time.monotonic()
        multiply(a).block_until_ready()
        best = min(best, time.monotonic() - started)
    return Chip("cpu", 2 * side**3 / best, 0.0, 0.0, 0.0, 0.0, r"cpu$", "measured by a matrix product")
