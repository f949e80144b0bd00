"""Randomness that belongs to the sample, not to the rank.

Every draw comes from NumPy's counter-based Philox generator, keyed by (seed, purpose) and positioned by
(sample id, epoch). The same sample therefore gets the same noise, timestep, label drop and flip on any number of
ranks, on CPU or GPU, and after any restart. Draws are made on the host in float32, so that they are bit-equal on
every device.
"""

from __future__ import annotations

import enum

import numpy as np


class Purpose(enum.IntEnum):
    """What a stream of random numbers is for; streams of different purposes are independent."""

    TRAIN = 1
    SAMPLE = 2
    LABEL = 3
    EVALUATE = 4
    ENCODE = 5
    MIXTURE = 6


def generator(seed: int, purpose: Purpose, index: int, epoch: int = 0) -> np.random.Generator:
    """The generator of one sample.

    Args:
        seed: the run's seed, 0 <= seed < 2**63.
        purpose: which stream.
        index: sample id (training) or image index (sampling), >= 0.
        epoch: pass over the data, >= 0; 0 in sampling.

    Philox has a 256-bit counter of four words. The lowest word is advanced by the draws themselves, so (index, epoch)
    sit in the two words above it and streams can never overlap.
    """
    # NumPy takes the key as an array of exact uint64; a Python list of mixed sizes would be cast through float.
    key = np.array([seed, int(purpose)], dtype=np.uint64)
    counter = np.array([0, index, epoch, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
