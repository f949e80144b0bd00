"""The interval between saves: the formula, its bounds, and what is held for the time between faults."""

from __future__ import annotations

import math

import pytest

from diffussm.checkpoint.pace import Measured, fault_every_s, interval_images


def test_the_interval_is_the_one_at_which_saves_and_lost_steps_together_cost_least() -> None:
    stall, faults, rate = 2.0, 3600.0, 100.0
    found = interval_images(Measured(stall, 1.0, rate, faults), 1, 10**9) / rate

    def waste(seconds: float) -> float:
        return stall / seconds + seconds / (2 * faults)

    assert found == pytest.approx(math.sqrt(2 * stall * faults), rel=1e-3)
    assert waste(found) < min(waste(0.8 * found), waste(1.25 * found))


def test_it_is_whole_steps_within_what_the_config_allows_and_a_save_takes() -> None:
    measured = Measured(stall_s=0.5, save_s=1, images_per_s=10, fault_every_s=10_000)  # 100 s, 1,000 images
    assert interval_images(measured, 64, 10**9) == 960
    assert interval_images(measured, 64, 300) == 256
    assert interval_images(measured, 64, 10) == 64
    slow = Measured(stall_s=0.5, save_s=400, images_per_s=10, fault_every_s=10_000)
    assert interval_images(slow, 64, 10**9) == 8_000, "two saves' time: a save must end before the next"
    assert interval_images(Measured(0, 0, 10, 100), 64, 10**9) == 64


def test_what_happened_outweighs_what_was_expected() -> None:
    assert fault_every_s(86_400, 0, 0) == 86_400
    assert fault_every_s(86_400, 86_400, 0) == 2 * 86_400
    assert fault_every_s(86_400, 600, 29) == pytest.approx(2_900)
    assert fault_every_s(100, -5, 0) == 100, "a clock that was set back"
