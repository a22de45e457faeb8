"""The table of accelerators."""

import pytest

from micro_dit.planning.chips import CHIPS, chip_of


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("cpu", None),
        ("TPU v4 lite", None),
        ("NVIDIA L40S", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_chips_are_found_by_device_kind(device_kind: str, name: str) -> None:
    chip = chip_of(device_kind)
    assert (chip.name if chip else None) == name


def test_every_figure_has_a_source() -> None:
    assert all(chip.source and chip.peak_flops > 1e13 and chip.memory > 1e10 for chip in CHIPS.values())
    assert all(chip.interconnect < chip.bandwidth < chip.peak_flops for chip in CHIPS.values())
