from __future__ import annotations

import pytest

from diffussm.observe.meter import Meter


def test_rate_is_of_the_last_stretch_and_eta_of_the_whole() -> None:
    now = [100.0]
    meter = Meter(done=1000, total=5000, clock=lambda: now[0])
    now[0] = 110.0
    assert meter.read(2000).rate == pytest.approx(100.0)
    now[0] = 130.0
    reading = meter.read(3000)
    assert reading.rate == pytest.approx(50.0)
    assert reading.eta_s == pytest.approx(2000 / (2000 / 30))


def test_without_progress_the_eta_is_infinite() -> None:
    assert Meter(0, 10, clock=lambda: 1.0).read(0).eta_s == float("inf")
