from __future__ import annotations

import pytest

from diffussm.errors import DivergedError, ExitCode
from diffussm.train.guard import Guard


def test_only_steps_in_a_row_stop_the_run() -> None:
    guard = Guard(limit=3, total=5)
    for skipped in (True, True, False, True, True):
        guard.observe(skipped, images=10)
    assert guard.total == 9
    with pytest.raises(DivergedError, match=r"3 steps in a row .* 1,234 images") as caught:
        guard.observe(True, images=1234)
    assert caught.value.code is ExitCode.DIVERGED
