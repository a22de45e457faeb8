"""Estimated hours and dollars, compared with the paper's table of costs."""

import dataclasses
from typing import Any

import pytest

from micro_dit.errors import UserError
from micro_dit.models.config import make_config
from micro_dit.planning.chips import CHIPS
from micro_dit.planning.cost import estimate_cost
from micro_dit.training.phases import Phase

PHASES = [
    Phase(f"{resolution} px, mask {ratio}", resolution, steps, 2048, learning_rate=1e-4, mask_ratio=ratio)
    for resolution, ratio, steps in ((256, 0.75, 250_000), (256, 0.0, 30_000), (512, 0.75, 50_000), (512, 0.0, 5_000))
]
NETWORKS = [make_config("MicroDiT_XL_2", input_size=phase.resolution // 8) for phase in PHASES]


def test_the_estimate_agrees_with_the_paper() -> None:
    """The FLOPs in the paper's table are 3 × forward and include the one-hot products of the public release."""
    flops = (1.47e20, 4.53e19, 1.18e20, 3.48e19)
    days = (1.11, 0.38, 0.88, 0.26)
    dollars = (800, 271, 630, 189)
    images_per_second = (667, 234, 168, 57)
    mfu = (0.194, 0.174, 0.196, 0.196)
    for i, (network, phase) in enumerate(zip(NETWORKS, PHASES, strict=True)):
        result = estimate_cost([network], [phase], CHIPS["h100"], devices=8, mfu=mfu[i], one_hot_dispatch=True)
        assert result.flops == pytest.approx(flops[i], rel=0.01)
        assert result.hours / 24 == pytest.approx(days[i], rel=0.03)
        assert result.dollars == pytest.approx(dollars[i], rel=0.03)
        assert result.phases[0].images_per_second / 8 == pytest.approx(images_per_second[i], rel=0.03)
    total = estimate_cost(NETWORKS, PHASES, CHIPS["h100"], one_hot_dispatch=True).flops
    assert total == pytest.approx(3.45e20, rel=0.01)


def test_the_totals_are_the_sums_over_phases() -> None:
    result = estimate_cost(NETWORKS, PHASES, CHIPS["v5e"], devices=16, mfu=0.4, price=2.0)
    assert result.hours == pytest.approx(sum(cost.hours for cost in result.phases))
    assert result.dollars == pytest.approx(result.hours * 16 * 2.0)
    table = result.table()
    assert all(phase.name in table for phase in PHASES)
    assert f"{result.dollars:,.0f}" in table
    assert len({len(line) for line in table.splitlines()[2:]}) == 1, "columns are not aligned"


@pytest.mark.parametrize("wrong", [{"mfu": 0.0}, {"mfu": 40.0}, {"devices": 0}])
def test_invalid_mfu_and_devices_are_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="mfu"):
        estimate_cost(NETWORKS, PHASES, CHIPS["h100"], **wrong)


def test_dollars_are_none_if_the_price_is_unknown() -> None:
    free = dataclasses.replace(CHIPS["h100"], price=None)
    result = estimate_cost(NETWORKS, PHASES, free)
    assert result.dollars is None
    assert "–" in result.table()
