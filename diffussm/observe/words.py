"""Numbers as people read them. Pure."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`; `?` if not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def short(number: float) -> str:
    """A number with a metric prefix: 12345 is `12.3 k`."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(number) >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number:.3g} "


def count(number: int) -> str:
    """A whole number; `?` for 0, which nothing has told yet."""
    return f"{number:,}" if number else "?"
