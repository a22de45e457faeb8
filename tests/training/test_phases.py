from typing import Any

import numpy as np
import pytest

from micro_dit.errors import UserError
from micro_dit.training.phases import Phase, make_phases, phase_starts

MINIMAL: dict[str, Any] = dict(name="one", resolution=64, steps=100, batch_size=4, learning_rate=0.1, mask_ratio=0.75)


def rates(**fields: Any) -> np.ndarray:
    schedule = Phase(**MINIMAL | fields).schedule()
    return np.asarray([schedule(step) for step in range(fields.get("steps", 100) + 1)])


def test_the_learning_rate_is_constant_by_default() -> None:
    np.testing.assert_allclose(rates(), 0.1, rtol=1e-6)


def test_warm_up_is_followed_by_cosine_decay_to_the_final_rate() -> None:
    values = rates(warmup_steps=20, final_lr_ratio=0.33)
    np.testing.assert_allclose(values[:21], 0.1 * np.arange(21) / 20, rtol=1e-5, atol=1e-9)
    after = np.arange(81) / 80
    cosine = 0.1 * (0.33 + (1 - 0.33) * (1 + np.cos(np.pi * after)) / 2)
    np.testing.assert_allclose(values[20:], cosine, rtol=1e-4)
    assert values[-1] == pytest.approx(0.033, rel=1e-4)


def test_warm_up_can_be_followed_by_a_constant_rate() -> None:
    values = rates(warmup_steps=10)
    np.testing.assert_allclose(values[10:], 0.1, rtol=1e-6)
    assert values[0] == 0
    assert values[5] == pytest.approx(0.05)


def test_the_defaults_are_the_papers_at_256_px() -> None:
    phase = Phase(**MINIMAL)
    assert (phase.clip, phase.P_mean, phase.P_std, phase.mask_position) == (0.25, -0.6, 1.2, "after_mixer")
    assert (phase.ema_decay, phase.fresh_optimizer, phase.pos_interp_scale) == (0.0, False, 1.0)


def test_each_phase_starts_at_the_end_of_the_previous_one() -> None:
    phases = make_phases([MINIMAL, MINIMAL | dict(name="two", steps=30)])
    assert [phase.name for phase in phases] == ["one", "two"]
    assert phase_starts(phases) == [0, 100, 130]


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], "has no phases. Add at least one"),
        ([MINIMAL | dict(lerning_rate=1)], r"phases\[0\] has no field lerning_rate\. Its fields are name, .*rate"),
        ([{k: v for k, v in MINIMAL.items() if k != "steps"}], r"phases\[0\] is missing steps"),
        ([MINIMAL | dict(steps=0)], r"\('one'\) has steps 0 and batch_size 4, but both must be at least 1"),
        ([MINIMAL | dict(batch_size=0)], "batch_size 0, but both must be at least 1"),
        ([MINIMAL | dict(ema_decay=1.0)], r"ema_decay must be in \[0, 1\)"),
        ([MINIMAL | dict(clip=0)], "clip 0, .* the others must be positive"),
        ([MINIMAL | dict(learning_rate=-1.0)], "learning_rate -1.0.* must be positive"),
        ([MINIMAL | dict(mask_position="nowhere")], "'nowhere', but it must be one of after_mixer, before_mixer"),
        ([MINIMAL, MINIMAL], "Several phases are named one. Phase names must be unique"),
    ],
)
def test_invalid_phases_are_rejected(configs: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_phases(configs)
    assert "\n" not in str(error.value)
