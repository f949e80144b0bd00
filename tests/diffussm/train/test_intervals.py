from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffussm.train.intervals import due, passed


@given(st.integers(1, 50), st.integers(1, 200), st.integers(1, 40))
def test_each_boundary_is_met_once_and_the_end_always(step: int, interval: int, steps: int) -> None:
    total = step * steps
    met = [images for images in range(step, total + 1, step) if due(images, step, interval, total)]
    assert met[-1] == total
    for boundary in range(interval, total + 1, interval):
        inside = [images for images in met if images - step < boundary <= images]
        assert len(inside) == 1


@pytest.mark.parametrize(("images", "expected"), [(90, False), (100, True), (110, False), (200, True), (1000, True)])
def test_on_the_boundary(images: int, expected: bool) -> None:
    assert due(images, 10, 100, 1000) is expected


def test_one_step_sees_each_image() -> None:
    steps = [8, 16, 24]
    for at, expected in ((1, 8), (8, 8), (9, 16), (24, 24)):
        assert [images for images in steps if passed(images, 8, at)] == [expected]
