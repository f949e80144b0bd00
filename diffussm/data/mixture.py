"""Several sets of latents in one training, for example of 256 and 512 px: which set each global batch comes from. Pure.

A global batch is of one set, so that its latents have one shape, and every rank reads the same set in the same step.
Which set comes next is drawn from seed and epoch alone; each comes as often as it has whole batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffussm.data.cursor import epoch_images
from diffussm.rng import Purpose, generator

ID_STRIDE = 1 << 40
"""Added to the sample ids of each further set, so that the draws of its samples are their own."""


@dataclass(frozen=True)
class Mixture:
    """The sets of a run."""

    numbers: tuple[int, ...]
    """Samples of each set."""
    global_batch: int
    seed: int

    @property
    def batches(self) -> tuple[int, ...]:
        """Whole global batches of each set; raises DataError if a set has none."""
        return tuple(epoch_images(number, self.global_batch) // self.global_batch for number in self.numbers)

    @property
    def epoch_images(self) -> int:
        """Images of one epoch over all sets."""
        return sum(self.batches) * self.global_batch

    def schedule(self, epoch: int) -> list[int]:
        """Which set each global batch of `epoch` comes from."""
        turns = np.repeat(np.arange(len(self.numbers)), self.batches)
        if len(self.numbers) > 1:
            generator(self.seed, Purpose.MIXTURE, 0, epoch).shuffle(turns)
        return [int(turn) for turn in turns]
