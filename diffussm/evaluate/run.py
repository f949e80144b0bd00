"""One evaluation: features of generated pictures, their distance from the real ones, and the floor beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from diffussm.checkpoint.store import Store
from diffussm.errors import DataError
from diffussm.evaluate.extractors import Extractor
from diffussm.evaluate.metrics import frechet
from diffussm.evaluate.moments import Moments
from diffussm.evaluate.reference import Pictures, Progress, Reference, collect, prepare_reference


@dataclass(frozen=True)
class Result:
    """A score and everything that is needed to judge it."""

    metric: str
    """Name of the distance, which names the feature network; never FID unless it is FID."""
    value: float
    """The distance of the generated from the real pictures."""
    n: int
    """Generated pictures."""
    reference_n: int
    """Real pictures they were compared with."""
    floor: float
    """Distance of `floor_n` real pictures from the other `floor_rest` real ones."""
    floor_n: int
    """n, or half of the real pictures if that is less."""
    floor_rest: int
    """Real pictures on the other side of the floor."""
    extractor: str
    """Digest of the feature network and its preprocessing."""
    seconds: float
    """Wall-clock time of generating and scoring, without the reference."""
    sampler: Mapping[str, Any] = field(default_factory=dict)
    """Settings the pictures were generated with."""

    def line(self) -> str:
        """The score in one line, never without its floor."""
        return (
            f"{self.metric} = {self.value:.1f} "
            f"(n = {self.n}; real against real at n = {self.floor_n}: {self.floor:.1f})"
        )

    def to_json(self) -> str:
        """All fields as JSON. Raises ValueError if a number is not finite, TypeError if a setting is not JSON."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False)

    def save(self, store: Store, key: str) -> None:
        """Write the JSON to `key`. Raises StorageError."""
        store.write(key, (self.to_json() + "\n").encode())


def score(
    images: Iterable[np.ndarray],
    reference: Reference,
    extractor: Extractor,
    *,
    sampler: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Score generated pictures against a reference.

    Args:
        images: uint8 (B, H, W, 3) batches; generated while they are scored, if it is a generator.
        reference: the real side, made with the same extractor.
        extractor: feature network.
        sampler: settings of the sampler, kept with the result.
        progress: called after each batch with its size.

    Raises:
        DataError: fewer than 2 pictures.
        ValueError: the reference was made with another extractor.
    """
    start = time.perf_counter()
    generated = collect(images, extractor, progress)
    return compare(generated, reference, extractor, sampler=sampler, seconds=time.perf_counter() - start)


def compare(
    generated: Moments,
    reference: Reference,
    extractor: Extractor,
    *,
    sampler: Mapping[str, Any] | None = None,
    seconds: float = 0.0,
) -> Result:
    """`score` for moments that were collected already, for example on several workers and merged.

    Raises:
        DataError: moments of fewer than 2 pictures.
        ValueError: the reference was made with another extractor.
    """
    if reference.extractor != extractor.digest:
        raise ValueError(f"reference: made with extractor {reference.extractor}; this one is {extractor.digest}")
    if generated.n < 2:
        raise DataError(f"evaluate.images: found {generated.n} generated pictures; at least 2 are needed")
    real, floor = reference.moments, reference.floor
    return Result(
        metric=extractor.metric,
        value=frechet(generated.mean, generated.covariance, real.mean, real.covariance),
        n=generated.n,
        reference_n=real.n,
        floor=floor.value,
        floor_n=floor.n,
        floor_rest=floor.rest,
        extractor=extractor.digest,
        seconds=round(seconds, 3),
        sampler=dict(sampler or {}),
    )


def evaluate(
    images: Iterable[np.ndarray],
    extractor: Extractor,
    store: Store,
    pictures: Pictures,
    *,
    n: int,
    count: int,
    data: str,
    sampler: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Reference and score in one call.

    Args:
        images: `n` generated pictures in uint8 (B, H, W, 3) batches.
        extractor: feature network.
        store: where the reference is kept (beside the latents).
        pictures: begins a pass over the real pictures.
        n: number of generated pictures.
        count: number of real pictures.
        data: identity of the real pictures, see `prepare_reference`.
        sampler: settings of the sampler, kept with the result.
        progress: called after each batch, of real and of generated pictures.

    Raises:
        DataError: too few pictures, `images` does not yield `n`, or the real ones do not match `count`.
        StorageError: the store cannot be read or written.
    """
    real = prepare_reference(store, extractor, pictures, count=count, n=n, data=data, progress=progress)
    result = score(images, real, extractor, sampler=sampler, progress=progress)
    if result.n != n:
        raise DataError(f"evaluate.images: found {result.n} generated pictures, expected {n}")
    return result
