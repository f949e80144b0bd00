"""A reference from an .npz as ADM publishes them: statistics of a whole training set and some of its pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
from safetensors.numpy import load, save

from diffussm.checkpoint.store import NotFound, Store
from diffussm.errors import DataError
from diffussm.evaluate import npz
from diffussm.evaluate.extractors import POOL, Extractor, Features
from diffussm.evaluate.moments import Accumulator
from diffussm.evaluate.reference import Reference
from diffussm.evaluate.scores import DISTANCES, RealSide


def read_reference(
    path: Path, extractor: Extractor, store: Store, batch: int, progress: Callable[[int], None] = lambda more: None
) -> Reference:
    """The reference in an .npz file.

    Statistics come from `mu`, `sigma`, `mu_s`, `sigma_s`, or from the pictures when the file has none; features of
    precision, recall and KID from `arr_0`. Those are computed once and kept in `store`. There is no floor: the
    pictures may be among those that the statistics are of.

    Args:
        path: the file.
        extractor: feature network.
        store: the run's.
        batch: pictures in one pass of the extractor.
        progress: told how many pictures were just done.

    Raises:
        DataError: as `identify`.
    """
    statistics, digest = _statistics(path, extractor), _digest(path)
    features = _features(path, digest, extractor, store, batch, progress)
    if not statistics:
        statistics = {tap: _moments(features[tap]) for tap in DISTANCES if tap in features}
    side = RealSide(statistics, features[POOL])
    return Reference(digest, extractor.digest, str(path), 0, side, None)


def identify(path: Path, extractor: Extractor) -> str:
    """Digest of an .npz file, once it is seen that it can be the reference of this extractor.

    Raises:
        DataError: no such file, neither statistics nor pictures in it, or statistics of another extractor.
    """
    _statistics(path, extractor)
    return _digest(path)


def _statistics(path: Path, extractor: Extractor) -> npz.Statistics:
    """Those of the file, none if it has pictures alone; raises as `identify`."""
    if not path.is_file():
        raise DataError(f"evaluate.reference: {path} is no file", "name an .npz file, or leave it empty")
    statistics, made_with = npz.statistics(path)
    named = made_with or "ADM's Inception"
    is_ours = made_with == extractor.digest if made_with else extractor.name == "inception"
    if statistics and not is_ours:
        raise DataError(
            f"evaluate.reference: {path} has statistics of extractor {named}; this one is {extractor.digest}",
            "set evaluate.extractor=inception for ADM's files, or build the reference with this extractor",
        )
    if not statistics and len(next(npz.pictures(path, 2), ())) < 2:
        raise DataError(f"evaluate.reference: {path} has neither mu and sigma nor arr_0", "name another file")
    return statistics


def _features(
    path: Path, digest: str, extractor: Extractor, store: Store, batch: int, progress: Callable[[int], None]
) -> Features:
    key = f"evaluations/references/{digest}-{extractor.digest}.safetensors"
    try:
        return load(store.read(key))
    except NotFound:
        pass
    parts = []
    for pictures in npz.pictures(path, batch):
        parts.append(extractor.extract(pictures))
        progress(len(pictures))
    parts = parts or [extractor.extract(np.zeros((0, 1, 1, 3), np.uint8))]
    wanted = [tap for tap in DISTANCES if tap in extractor.taps]
    found = {tap: np.concatenate([part[tap] for part in parts]) for tap in wanted}
    store.write(key, save(found))
    return found


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sums = Accumulator(features.shape[1])
    sums.add(features)
    moments = sums.moments()
    return moments.mean, moments.covariance


def _digest(path: Path) -> str:
    total = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            total.update(part)
    return total.hexdigest()
