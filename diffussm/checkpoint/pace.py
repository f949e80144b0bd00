"""How often to save: at fixed intervals, or as often as what a save costs and how often faults come make it pay. Pure.

A save costs the steps its stall; a fault costs half an interval on average. The sum is least at sqrt(2 * cost * time
between faults) (J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974; J. T.
Daly, A higher order estimate of the optimum checkpoint interval, FGCS 22(3), 2006).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FIRST_STEPS = 50
"""Steps of a start before its first save, when nothing is measured yet."""
APART = 2.0
"""Times a save's whole duration that lie between two of them at least, so that none is skipped."""


@dataclass(frozen=True)
class Measured:
    """What a start has seen so far."""

    stall_s: float
    """Seconds by which the last save held up the steps."""
    save_s: float
    """Seconds from its snapshot to its manifest."""
    images_per_s: float
    fault_every_s: float
    """Mean seconds between two faults."""


def fault_every_s(expected_s: float, elapsed_s: float, faults: int) -> float:
    """Mean seconds between faults: what was expected counts as much as one fault after `expected_s`."""
    return (expected_s + max(0.0, elapsed_s)) / (1 + max(0, faults))


def interval_images(measured: Measured, step_images: int, most_images: int) -> int:
    """Images until the next save: whole steps, at least one, and no more than `most_images` where that is more.

    Args:
        measured: costs and rates.
        step_images: train.global_batch.
        most_images: checkpoint.every_images, the longest interval.
    """
    seconds = max(math.sqrt(2 * measured.stall_s * measured.fault_every_s), APART * measured.save_s)
    images = min(seconds * measured.images_per_s, most_images)
    return max(1, math.floor(images / step_images)) * step_images
