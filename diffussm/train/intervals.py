"""When something is due: intervals are counted in images, and the end counts as a boundary of every one."""

from __future__ import annotations


def due(images: int, step_images: int, interval: int, total: int) -> bool:
    """Whether an interval boundary, or the end, lies within the step that ended at `images`."""
    return images >= total or images // interval > (images - step_images) // interval


def passed(images: int, step_images: int, at: int) -> bool:
    """Whether image number `at`, counted from 1, was seen in the step that ended at `images`."""
    return images - step_images < at <= images
