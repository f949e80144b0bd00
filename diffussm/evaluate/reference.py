"""The real pictures' side of a score: moments and some features, kept beside the latents, and the floor.

They come from the source pictures after the crop, not from decoded latents, as in ADM's suite: what the autoencoder
loses is part of the score.

The floor is what real pictures themselves score. A Frechet distance falls with the number of pictures, so it is read
against the distance of the same number of real pictures from the other real ones. It is measured the way a model is:
`n` pictures on one side, many on the other, no picture on both.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

from diffussm.checkpoint.store import NotFound, Store
from diffussm.errors import DataError
from diffussm.evaluate.extractors import POOL, Extractor, Features
from diffussm.evaluate.moments import Accumulator, Moments
from diffussm.evaluate.scores import DISTANCES, REFERENCE_IMAGES, RealSide, Tally
from diffussm.rng import Purpose, generator

_LOG = logging.getLogger(__name__)

Progress = Callable[[int], None]
"""Called with the number of pictures that were just done."""

Pictures = Callable[[], Iterable[np.ndarray]]
"""Begins a pass over the real pictures: uint8 (B, H, W, 3) batches, the same pictures in the same order each time."""


@dataclass(frozen=True)
class Floor:
    """What real pictures score against other real pictures."""

    values: Mapping[str, float]
    """Kind -> value."""
    n: int
    """Pictures on the one side: the generated number, or half of the real ones if that is less."""
    rest: int
    """Pictures on the other side: all other real ones."""


@dataclass(frozen=True)
class Reference:
    """What generated pictures are compared with."""

    digest: str
    """Identity of moments and features."""
    extractor: str
    """Digest of the extractor."""
    source: str
    """Where the pictures come from."""
    n: int
    """Real pictures; 0 if a file of statistics does not say."""
    side: RealSide
    """Moments of all of them and features of some."""
    floor: Floor | None
    """What real pictures score; None where it cannot be measured."""


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

    Two files, `reference-<extractor digest>.safetensors` (moments, features) and `.json` (what they are of, and the
    floor for each n asked for so far). The JSON is written last and holds the other's digest; without it they do not
    count. A first call passes all pictures through the extractor; a later one with another n only those it draws.

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
    card, kept = _stored(store, extractor, count, data)
    m = min(n, count // 2)
    if kept is None or str(m) not in card["floors"]:
        made = _pass(extractor, pictures, _places(count, m), members(count), kept, progress)
        if kept is None:
            kept = made.kept
            blob = kept.to_bytes()
            store.write(f"{_stem(extractor)}.safetensors", blob)
            card["digest"] = _digest(blob)
        card["floors"][str(m)] = _floor(extractor, made.drawn, kept)
        store.write(f"{_stem(extractor)}.json", json.dumps(card, indent=2, sort_keys=True).encode())
    side = _side(kept.moments, kept.features)
    return Reference(card["digest"], extractor.digest, data, count, side, Floor(card["floors"][str(m)], m, count - m))


def members(count: int) -> np.ndarray:
    """Which of `count` real pictures are kept with features, and written to an .npz: bool (count,).

    The last ones of a fixed permutation. Those the floor draws are the first ones, so the two never meet.
    """
    chosen = np.zeros(count, bool)
    chosen[_permutation(count)[count - min(REFERENCE_IMAGES, count // 2) :]] = True
    return chosen


def statistics_of(reference: Reference) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tap -> mean and covariance, to be written to an .npz."""
    return dict(reference.side.statistics)


@dataclass(frozen=True, eq=False)
class Kept:
    """What is stored of the real pictures."""

    moments: Mapping[str, Moments]
    """Tap -> moments of all of them."""
    features: np.ndarray
    """Pool features of the members: float32 (N, d)."""

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        tensors = {"features": self.features}
        for tap, part in self.moments.items():
            tensors |= {
                f"{tap}.n": np.array([part.n], np.int64),
                f"{tap}.total": part.total,
                f"{tap}.outer": part.outer,
            }
        return save(tensors)

    @classmethod
    def from_bytes(cls, blob: bytes, taps: Mapping[str, int], where: str) -> Kept:
        """Read what `to_bytes` wrote. Raises DataError if it is something else."""
        try:
            tensors = load(blob)
            moments = {
                tap: Moments(int(tensors[f"{tap}.n"][0]), tensors[f"{tap}.total"], tensors[f"{tap}.outer"])
                for tap in DISTANCES
                if tap in taps
            }
            features = tensors["features"]
        except (SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{where}: is no reference ({error})", "delete it; it is made again") from error
        return cls(moments, features)


@dataclass(frozen=True, eq=False)
class _Pass:
    drawn: Features
    """Features of the pictures that the floor takes out, in the order of the draw."""
    kept: Kept


def _stem(extractor: Extractor) -> str:
    return f"reference-{extractor.digest}"


def _permutation(count: int) -> np.ndarray:
    """The same on every machine."""
    return generator(0, Purpose.EVALUATE, count).permutation(count)


def _places(count: int, m: int) -> np.ndarray:
    """Place of each real picture in the draw of m, -1 for those not drawn: int (count,).

    The draw's own order, not the source's, which may go class by class and would spoil the Inception score's splits.
    """
    places = np.full(count, -1)
    places[_permutation(count)[:m]] = np.arange(m)
    return places


def _pass(
    extractor: Extractor,
    pictures: Pictures,
    places: np.ndarray,
    chosen: np.ndarray,
    kept: Kept | None,
    progress: Progress | None,
) -> _Pass:
    """One pass over the real pictures: all go through the extractor, or with `kept` only the drawn ones."""
    m = int((places >= 0).sum())
    drawn = {tap: np.empty((m, length), np.float32) for tap, length in extractor.taps.items()}
    sums = {tap: Accumulator(length) for tap, length in extractor.taps.items() if tap in DISTANCES}
    features = []
    seen = 0
    for batch in pictures():
        here = slice(seen, seen + len(batch))
        seen += len(batch)
        if seen > len(places):
            break
        place, is_drawn = places[here], places[here] >= 0  # (B,)
        found = extractor.extract(batch if kept is None else batch[is_drawn])  # (B or fewer, d)
        for tap, values in found.items():
            drawn[tap][place[is_drawn]] = values[is_drawn] if kept is None else values
        if kept is None:
            for tap, part in sums.items():
                part.add(found[tap])
            features.append(found[POOL][chosen[here]])
        if progress is not None:
            progress(len(batch))
    if seen != len(places):
        count = f"at least {seen}" if seen > len(places) else str(seen)
        raise DataError(
            f"reference: found {count} real pictures, expected {len(places)}: not those the latents were made of",
            "run `diffussm prepare` again, into a new data.latents",
        )
    if kept is None:
        kept = Kept({tap: part.moments() for tap, part in sums.items()}, np.concatenate(features))
    return _Pass(drawn, kept)


def _floor(extractor: Extractor, drawn: Features, kept: Kept) -> dict[str, float]:
    """Kind -> what the drawn pictures score against all others."""
    tally = Tally(extractor.taps, len(drawn[POOL]))
    tally.add(drawn)
    rest = {tap: whole.without(tally.moments(tap)) for tap, whole in kept.moments.items()}
    return {kind: score.value for kind, score in tally.scores(_side(rest, kept.features)).items()}


def _side(moments: Mapping[str, Moments], features: np.ndarray) -> RealSide:
    return RealSide({tap: (part.mean, part.covariance) for tap, part in moments.items()}, features)


def _stored(store: Store, extractor: Extractor, count: int, data: str) -> tuple[dict[str, Any], Kept | None]:
    """The card and what it is of, or a fresh card and None when there are none for these pictures."""
    fresh: dict[str, Any] = {
        "extractor": extractor.name,
        "extractor_digest": extractor.digest,
        "images": count,
        "data": data,
        "floors": {},
    }
    stem = _stem(extractor)
    remedy = f"delete {stem}.json there; the reference is made again"
    try:
        card = json.loads(store.read(f"{stem}.json"))
    except NotFound:
        return fresh, None
    except ValueError as error:
        raise DataError(f"{store.url}/{stem}.json: not JSON: {error}", remedy) from error
    if not isinstance(card, dict) or fresh.keys() | {"digest"} != card.keys() or not isinstance(card["floors"], dict):
        raise DataError(f"{store.url}/{stem}.json: keys are missing or unknown", remedy)
    if (card["images"], card["data"]) != (count, data):
        _LOG.info(
            "%s/%s: of %s pictures of data %s; made again for %s of %s",
            store.url, stem, card["images"], card["data"], count, data,
        )  # fmt: skip
        return fresh, None
    where = f"{store.url}/{stem}.safetensors"
    try:
        blob = store.read(f"{stem}.safetensors")
    except NotFound as error:
        raise DataError(f"{where}: missing, its .json is there", remedy) from error
    if _digest(blob) != card["digest"]:
        raise DataError(f"{where}: found digest {_digest(blob)}, written was {card['digest']}", remedy)
    return card, Kept.from_bytes(blob, extractor.taps, where)


def _digest(blob: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(blob)
