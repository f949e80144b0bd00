"""Digests: XXH3-128 of files, and of tensors one that adds up over slices."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

_BLOCK = 1 << 15
"""Elements mixed at a time: small enough for the second-level cache."""
_MASK = (1 << 64) - 1


def digest_blocks(blocks: Iterable[bytes | memoryview]) -> str:
    """XXH3-128 of the blocks one after another, in hexadecimal."""
    state = xxhash.xxh3_128()
    for block in blocks:
        state.update(block)
    return state.hexdigest()


def digest_file(path: Path) -> str:
    """XXH3-128 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return digest_blocks(iter(lambda: file.read(1 << 22), b""))


def slice_sum(values: Tensor, start: int) -> int:
    """A 64-bit digest of elements [start, start + numel) of a flattened tensor of 32 or 16 bits each, (numel,).

    Each element's bits and index are mixed into 64 bits (the finaliser of SplitMix64: Steele, Lea and Flood 2014), and
    the results are added modulo 2**64. So the digests of the slices of a tensor add up to the digest of the whole,
    however it is cut: state saved by any number of ranks can be compared with state restored by any other.
    """
    signed_bits, kind = (torch.int32, np.uint32) if values.element_size() == 4 else (torch.int16, np.uint16)
    bits = values.detach().cpu().contiguous().view(signed_bits).numpy().view(kind)  # (numel,)
    index = np.arange(_BLOCK, dtype=np.uint64) << np.uint64(32)
    mixed, shifted = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
    total = 0
    for low in range(0, len(bits), _BLOCK):
        block = bits[low : low + _BLOCK]
        x, y = mixed[: len(block)], shifted[: len(block)]
        np.add(index[: len(block)], np.uint64(((start + low) << 32) + 0x9E3779B97F4A7C15 & _MASK), out=x)
        np.add(x, block, out=x)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            np.right_shift(x, np.uint64(shift), out=y)
            np.bitwise_xor(x, y, out=x)
            np.multiply(x, np.uint64(factor), out=x)
        np.right_shift(x, np.uint64(31), out=y)
        np.bitwise_xor(x, y, out=x)
        total += int(x.sum(dtype=np.uint64))
    return total & _MASK


def add(sums: Iterable[int]) -> int:
    """The digest of a tensor from those of its slices."""
    return sum(sums) & _MASK


def signed(total: int) -> int:
    """The same 64 bits as a signed number, which is what tensors hold; adding wraps around in both alike."""
    return total - (1 << 64) if total >= 1 << 63 else total


def text(total: int) -> str:
    """A tensor digest as 16 hexadecimal digits."""
    return f"{total & _MASK:016x}"
