"""An evaluation in blocks: pictures in, features in the store. Any workers can share it, and a kill costs a block.

A block is the pictures of consecutive indices. Noise and label belong to the index, and a batch never reaches over a
block's border, so a block's features are the same whoever makes it. What is kept of a block are its features in
float32: below some 4,000 pictures they are smaller than float64 moments (d^2 numbers), and all scores follow from them.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from diffussm.checkpoint.store import NotFound, Store
from diffussm.errors import DataError
from diffussm.evaluate.extractors import Extractor, Features
from diffussm.observe.grid import grid

Paint = Callable[[Sequence[int], int], np.ndarray]
"""(labels of consecutive pictures, index of the first) -> uint8 (B, H, W, 3)."""

PREVIEW_ROWS = 10


@dataclass(frozen=True)
class Plan:
    """Which pictures, made how, in which blocks. The same on every worker."""

    labels: tuple[int, ...]
    """Class of each picture."""
    block: int
    """Pictures of a block; the last one may be shorter."""
    batch: int
    """Pictures that are drawn at once."""
    extract_batch: int
    """Pictures that pass the extractor at once."""
    settings: Mapping[str, Any]
    """Everything else that decides the features, as plain data: weights, sampler, extractor, code."""

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over all of it: evaluations with equal digests can share blocks."""
        said = [self.labels, self.block, self.batch, self.extract_batch, self.settings]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def folder(self) -> str:
        """Where the blocks lie in the run's store."""
        return f"evaluations/partial/{self.digest}"

    @property
    def count(self) -> int:
        """Number of blocks."""
        return -(-len(self.labels) // self.block)

    def span(self, index: int) -> range:
        """Indices of the pictures of a block."""
        return range(index * self.block, min((index + 1) * self.block, len(self.labels)))

    def key(self, index: int, suffix: str = "safetensors") -> str:
        """Where a block's features lie; or with the suffix `npy` its pictures."""
        return f"{self.folder}/{index:06d}.{suffix}"


@dataclass(frozen=True)
class Report:
    """What making a block took."""

    index: int
    images: int
    sample_s: float
    """Seconds of drawing and decoding."""
    extract_s: float
    """Seconds of the extractor."""
    store_s: float
    """Seconds of writing."""


def missing(store: Store, plan: Plan, pictures: bool = False) -> list[int]:
    """Blocks that are not in the store yet; with `pictures` also those that lack theirs."""
    there = set(store.keys(f"{plan.folder}/"))
    wanted = ["safetensors", "npy"] if pictures else ["safetensors"]
    return [i for i in range(plan.count) if not all(plan.key(i, suffix) in there for suffix in wanted)]


def make(store: Store, plan: Plan, index: int, paint: Paint, extractor: Extractor, pictures: bool = False) -> Report:
    """Draw the pictures of a block and store their features, and with `pictures` themselves.

    The features are written last: a block that is cut off is made again.
    """
    span = plan.span(index)
    began = time.perf_counter()
    drawn = np.concatenate(
        [
            paint(plan.labels[first : min(first + plan.batch, span.stop)], first)
            for first in range(span.start, span.stop, plan.batch)
        ]
    )  # (block, H, W, 3)
    sampled = time.perf_counter()
    size = plan.extract_batch
    parts = [extractor.extract(drawn[start : start + size]) for start in range(0, len(drawn), size)]
    features = {tap: np.concatenate([part[tap] for part in parts]) for tap in extractor.taps}
    extracted = time.perf_counter()
    if pictures:
        store.write(plan.key(index, "npy"), _npy(drawn))
    if index == 0:
        store.write(f"{plan.folder}/first.npy", _npy(drawn[:512]))
    store.write(plan.key(index), save(features))
    done = time.perf_counter()
    return Report(index, len(span), sampled - began, extracted - sampled, done - extracted)


def features(store: Store, plan: Plan, taps: Mapping[str, int]) -> Iterator[Features]:
    """The features of all blocks in their order.

    Raises:
        DataError: a block is missing or broken; it is deleted, so that the same command makes it again.
    """
    for index in range(plan.count):
        key = plan.key(index)
        shape = {tap: (len(plan.span(index)), length) for tap, length in taps.items()}
        try:
            found = load(store.read(key))
            if {tap: values.shape for tap, values in found.items()} != shape:
                raise ValueError(f"found { ({tap: values.shape for tap, values in found.items()}) }, expected {shape}")
            if not all(np.isfinite(values).all() for values in found.values()):
                raise ValueError("a feature is not finite")
        except (NotFound, SafetensorError, ValueError) as error:
            store.delete(key)
            raise DataError(f"{store.url}/{key}: {error}", "start the same command again: it is made anew") from error
        yield {tap: found[tap] for tap in taps}


def pictures(store: Store, plan: Plan) -> Iterator[np.ndarray]:
    """The pictures of all blocks in their order: uint8 (block, H, W, 3)."""
    for index in range(plan.count):
        yield _read_npy(store.read(plan.key(index, "npy")))


def preview(store: Store, plan: Plan, classes: Sequence[str], per_class: int, credit: str) -> bytes:
    """A PNG of the first pictures, one row a class, for the `PREVIEW_ROWS` classes that fill their rows best.

    A class of fewer pictures ends in white ones.
    """
    drawn = _read_npy(store.read(f"{plan.folder}/first.npy"))
    rows: dict[int, list[int]] = {}
    for i, label in enumerate(plan.labels[: len(drawn)]):
        rows.setdefault(label, []).append(i)
    columns = min(per_class, max(map(len, rows.values())))
    best = sorted(sorted(rows, key=lambda label: (-len(rows[label][:columns]), label))[:PREVIEW_ROWS])
    sheet = np.full((len(best), columns, *drawn.shape[1:]), 255, np.uint8)
    for row, label in enumerate(best):
        found = rows[label][:columns]
        sheet[row, : len(found)] = drawn[found]
    pictures = sheet.reshape(-1, *drawn.shape[1:])
    return grid(pictures, [classes[label] for label in best], credit, max(1, 64 // drawn.shape[1]))


def delete(store: Store, plan: Plan) -> None:
    """Remove all blocks, when the result is stored, and what killed writes left beside them."""
    for key in [*store.keys(f"{plan.folder}/"), *store.unfinished(f"{plan.folder}/")]:
        store.delete(key)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=False)
    return stream.getvalue()


def _read_npy(blob: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(blob), allow_pickle=False)
