"""Where the reading of the data stands, and what it hands over.

The cursor counts images over all ranks, so that it means the same for every number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffussm.errors import DataError


@dataclass(frozen=True)
class Cursor:
    """A position in the endless sequence of epochs.

    `images_in_epoch` counts the images of this epoch that all ranks together have consumed. The incomplete batch at
    the end of an epoch is left out, so an epoch has `epoch_images(number, global_batch)` images.
    """

    epoch: int = 0
    images_in_epoch: int = 0

    def after_batch(self, number: int, global_batch: int) -> Cursor:
        """The position after one more global batch of a data set of `number` images."""
        here = self.normalised(number, global_batch)
        return Cursor(here.epoch, here.images_in_epoch + global_batch).normalised(number, global_batch)

    def normalised(self, number: int, global_batch: int) -> Cursor:
        """The same position, with the end of an epoch written as the beginning of the next.

        Raises:
            DataError: the position is not on the border of a global batch or lies beyond the end of the epoch.
        """
        length = epoch_images(number, global_batch)
        if self.epoch < 0 or self.images_in_epoch % global_batch or not 0 <= self.images_in_epoch <= length:
            raise DataError(
                f"data cursor: found image {self.images_in_epoch} of epoch {self.epoch}; allowed are multiples of "
                f"train.global_batch={global_batch} from 0 to {length}",
                "resume with the data and the train.global_batch that the run was started with",
            )
        return Cursor(self.epoch + 1, 0) if self.images_in_epoch == length else self


@dataclass(frozen=True)
class Batch:
    """Latents of one rank's share of a global batch: posterior moments of each picture and of its mirror image.

    Moments are shifted and scaled to about unit variance as the passport says; all are (B, C, H, W) fp32.
    """

    id: Tensor
    """(B,) int64 sample ids."""
    label: Tensor
    """(B,) int64."""
    mean: Tensor
    std: Tensor
    mean_flip: Tensor
    std_flip: Tensor

    def fingerprint(self, epoch: int) -> int:
        """A 64-bit sum over (epoch, sample id): equal for the same samples in any order, split over any ranks."""
        ids = self.id.numpy().astype(np.uint64)  # (B,)
        mixed = ids + np.uint64(1) + np.uint64(epoch % (1 << 32)) * np.uint64(1 << 32)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64 (Steele et al., 2014)
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        return int(mixed.sum(dtype=np.uint64).astype(np.int64))

    def __len__(self) -> int:
        return len(self.id)

    def split(self, size: int) -> list[Batch]:
        """Consecutive parts of `size` samples; the last may be smaller."""
        fields = (self.id, self.label, self.mean, self.std, self.mean_flip, self.std_flip)
        return [Batch(*parts) for parts in zip(*(torch.split(f, size) for f in fields), strict=True)]


def epoch_images(number: int, global_batch: int) -> int:
    """Images of an epoch: `number` without the last incomplete global batch; raises DataError if none is left."""
    if number < global_batch:
        raise DataError(
            f"train.global_batch: found {global_batch}; the latents hold {number} images, each once in an epoch",
            f"set train.global_batch to {number} or less, or use more images",
        )
    return number // global_batch * global_batch
