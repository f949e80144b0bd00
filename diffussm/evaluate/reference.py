"""The real pictures' side of a distance: their moments, kept beside the latents, and the floor.

The moments come from the source pictures after the crop, not from decoded latents, as in ADM's suite: what the
autoencoder loses is part of the score.

The floor is what real pictures themselves score. A Frechet distance falls with the number of pictures, so it is read
against the distance of the same number of real pictures from the other real ones. It is measured the way a model is:
`n` pictures on one side, many on the other, no picture on both.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from diffussm.checkpoint.store import NotFound, Store
from diffussm.errors import DataError
from diffussm.evaluate.extractors import Extractor
from diffussm.evaluate.metrics import frechet
from diffussm.evaluate.moments import Accumulator, Moments, merge
from diffussm.rng import Purpose, generator

_LOG = logging.getLogger(__name__)

Progress = Callable[[int], None]
"""Called with the number of pictures that were just done."""

Pictures = Callable[[], Iterable[np.ndarray]]
"""Begins a pass over the real pictures: uint8 (B, H, W, 3) batches, the same pictures in the same order each time."""


@dataclass(frozen=True)
class Floor:
    """Distance of real pictures from other real pictures."""

    value: float
    """The distance."""
    n: int
    """Pictures on the one side: the generated number, or half of the real ones if that is less."""
    rest: int
    """Pictures on the other side: all other real ones."""


@dataclass(frozen=True)
class Reference:
    """What generated pictures are compared with."""

    extractor: str
    """Digest of the extractor."""
    moments: Moments
    """Moments of all real pictures."""
    floor: Floor
    """What real pictures score."""


def prepare_reference(
    store: Store,
    extractor: Extractor,
    pictures: Pictures,
    *,
    count: int,
    n: int,
    data: str,
    progress: Progress | None = None,
) -> Reference:
    """The reference for `n` generated pictures: read from `store`, or made and written there.

    Two files, `reference-<extractor digest>.safetensors` (moments) and `.json` (what they are of, and the floor for
    each n asked for so far). The JSON is written last and holds the moments' digest; without it they do not count.
    A first call passes all pictures through the extractor; a later one with another n only those that it draws.

    Args:
        store: where the latents lie.
        extractor: feature network.
        pictures: begins a pass over the real pictures. Not called when everything is in the store.
        count: number of real pictures in a pass.
        n: number of generated pictures they will be compared with.
        data: identity of the pictures (for example the digest of the latents' passport); another one makes a new
            reference.
        progress: called after each batch.

    Raises:
        DataError: fewer than 4 real or 2 generated pictures, a pass does not yield `count`, or a stored file is broken.
        StorageError: the store cannot be read or written.
    """
    if count < 4 or n < 2:
        raise DataError(
            f"evaluate: found {count} real and {n} generated pictures; at least 4 and 2 are needed",
            "use more pictures: data.limit, evaluate.images",
        )
    card, moments = _stored(store, extractor, count, data)
    m = min(n, count // 2)
    if moments is not None and (known := card["floors"].get(str(m))) is not None:
        return Reference(extractor.digest, moments, Floor(float(known), m, count - m))
    drawn = _draw(count, m)  # (count,) bool
    if moments is None:
        one, other = _pass(extractor, pictures, drawn, True, progress)
        moments = merge([one, other])
        key = f"reference-{extractor.digest}.safetensors"
        blob = moments.to_bytes()
        store.write(key, blob)
        card["moments"] = _digest(blob)
    else:
        one, _ = _pass(extractor, pictures, drawn, False, progress)
        other = moments.without(one)
    value = frechet(one.mean, one.covariance, other.mean, other.covariance)
    card["floors"][str(m)] = value
    store.write(f"reference-{extractor.digest}.json", json.dumps(card, indent=2, sort_keys=True).encode())
    return Reference(extractor.digest, moments, Floor(value, m, count - m))


def collect(images: Iterable[np.ndarray], extractor: Extractor, progress: Progress | None = None) -> Moments:
    """Moments of the features of all pictures in uint8 (B, H, W, 3) batches, added in their order.

    Workers that each score their share send their `Moments` to one of them, which merges them in rank order.
    """
    sums = Accumulator(extractor.dim)
    for batch in images:
        sums.add(extractor.features(batch))
        if progress is not None:
            progress(len(batch))
    return sums.moments()


def _draw(count: int, m: int) -> np.ndarray:
    """Which m of `count` pictures the floor takes out: bool (count,), the same on every machine."""
    chosen = np.zeros(count, bool)
    chosen[generator(0, Purpose.EVALUATE, count).permutation(count)[:m]] = True
    return chosen


def _pass(
    extractor: Extractor, pictures: Pictures, drawn: np.ndarray, others: bool, progress: Progress | None
) -> tuple[Moments, Moments]:
    """Moments of the drawn pictures and, with `others`, of the rest (else of none), from one pass."""
    one, other = Accumulator(extractor.dim), Accumulator(extractor.dim)
    seen = 0
    for batch in pictures():
        mask = drawn[seen : seen + len(batch)]  # (B,)
        seen += len(batch)
        if seen > len(drawn):
            break
        if others:
            features = extractor.features(batch)  # (B, dim)
            one.add(features[mask])
            other.add(features[~mask])
        else:
            one.add(extractor.features(batch[mask]))
        if progress is not None:
            progress(len(batch))
    if seen != len(drawn):
        found = f"at least {seen}" if seen > len(drawn) else str(seen)
        raise DataError(
            f"reference: found {found} real pictures, expected {len(drawn)}: not those the latents were made of",
            "run `diffussm prepare` again, into a new data.latents",
        )
    return one.moments(), other.moments()


def _stored(store: Store, extractor: Extractor, count: int, data: str) -> tuple[dict[str, Any], Moments | None]:
    """The card and moments in the store, or a fresh card and None when there are none for these pictures."""
    fresh: dict[str, Any] = {
        "metric": extractor.metric,
        "extractor": extractor.name,
        "extractor_digest": extractor.digest,
        "images": count,
        "data": data,
        "floors": {},
    }
    stem = f"reference-{extractor.digest}"
    remedy = f"delete {stem}.json there; the reference is made again"
    try:
        card = json.loads(store.read(f"{stem}.json"))
    except NotFound:
        return fresh, None
    except ValueError as error:
        raise DataError(f"{store.url}/{stem}.json: not JSON: {error}", remedy) from error
    if not isinstance(card, dict) or fresh.keys() | {"moments"} != card.keys() or not isinstance(card["floors"], dict):
        raise DataError(f"{store.url}/{stem}.json: keys are missing or unknown", remedy)
    if (card["images"], card["data"]) != (count, data):
        _LOG.info(
            "%s/%s: of %s pictures of data %s; made again for %s of %s",
            store.url,
            stem,
            card["images"],
            card["data"],
            count,
            data,
        )
        return fresh, None
    try:
        blob = store.read(f"{stem}.safetensors")
    except NotFound as error:
        raise DataError(f"{store.url}/{stem}.safetensors: missing, its .json is there", remedy) from error
    if _digest(blob) != card["moments"]:
        raise DataError(
            f"{store.url}/{stem}.safetensors: found digest {_digest(blob)}, written was {card['moments']}", remedy
        )
    return card, Moments.from_bytes(blob, f"{store.url}/{stem}.safetensors")


def _digest(blob: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(blob)
