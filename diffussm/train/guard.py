"""Counts steps that were skipped because something was not finite, and says when to stop."""

from __future__ import annotations

from dataclasses import dataclass

from diffussm.errors import DivergedError


@dataclass
class Guard:
    """Non-finite steps: all so far, and those in a row up to now."""

    limit: int
    total: int = 0
    in_a_row: int = 0

    def observe(self, skipped: bool, images: int) -> None:
        """Count one step; every rank sees the same flag and so decides alike.

        Raises:
            DivergedError: `limit` steps in a row were skipped.
        """
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += int(skipped)
        if self.in_a_row >= self.limit:
            raise DivergedError(
                f"train: {self.in_a_row} steps in a row were not finite, the last at {images:,} images "
                f"(train.max_nonfinite_steps={self.limit})",
                "lower train.lr or set train.grad_clip=1; the last checkpoint holds finite weights",
            )
