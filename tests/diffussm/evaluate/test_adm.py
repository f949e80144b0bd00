from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffussm.checkpoint.store import Store, open_store
from diffussm.errors import DataError
from diffussm.evaluate import npz
from diffussm.evaluate.adm import identify, read_reference
from tests.diffussm.evaluate.test_extractors import Colours

IMAGES = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
COLOURS = IMAGES.mean((1, 2))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "run"))


def test_our_own_file_gives_its_statistics_and_the_features_of_its_pictures(store: Store, tmp_path: Path) -> None:
    statistics = {"pool": (np.arange(3.0), np.eye(3))}
    npz.write(tmp_path / "r.npz", IMAGES.shape, [IMAGES], statistics, "c0ffee")
    first = Colours()
    seen: list[int] = []
    found = read_reference(tmp_path / "r.npz", first, store, 4, seen.append)
    assert np.array_equal(found.side.statistics["pool"][0], np.arange(3.0))
    np.testing.assert_allclose(found.side.features, COLOURS, rtol=1e-6)
    assert (found.extractor, found.floor, found.source) == ("c0ffee", None, str(tmp_path / "r.npz"))
    assert seen == [4, 4, 1]
    second = Colours()
    again = read_reference(tmp_path / "r.npz", second, store, 4)
    assert (second.seen, again.digest) == (0, found.digest)
    assert np.array_equal(again.side.features, found.side.features)


def test_a_file_of_pictures_alone_gives_their_moments(store: Store, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", arr_0=IMAGES)
    mean, covariance = read_reference(tmp_path / "s.npz", Colours(), store, 4).side.statistics["pool"]
    np.testing.assert_allclose(mean, COLOURS.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(covariance, np.cov(COLOURS.T), rtol=1e-4)


def test_statistics_of_another_extractor_are_refused(store: Store, tmp_path: Path) -> None:
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=IMAGES)
    with pytest.raises(DataError, match="ADM's Inception"):
        read_reference(tmp_path / "adm.npz", Colours(), store, 4)
    inception = Colours()
    inception.name = "inception"
    assert read_reference(tmp_path / "adm.npz", inception, store, 4).side.statistics["pool"][0].tolist() == [0, 0, 0]
    npz.write(tmp_path / "other.npz", IMAGES.shape, [IMAGES], {"pool": (np.zeros(3), np.eye(3))}, "decade")
    with pytest.raises(DataError, match="decade"):
        read_reference(tmp_path / "other.npz", inception, store, 4)


def test_no_file_and_an_empty_one_are_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        read_reference(tmp_path / "none.npz", Colours(), store, 4)
    np.savez(tmp_path / "empty.npz", other=np.ones(1))
    with pytest.raises(DataError, match="neither"):
        read_reference(tmp_path / "empty.npz", Colours(), store, 4)


def test_a_file_is_judged_before_anything_is_extracted(store: Store, tmp_path: Path) -> None:
    extractor = Colours()
    np.savez(tmp_path / "s.npz", arr_0=IMAGES)
    before = identify(tmp_path / "s.npz", extractor)
    assert (before, extractor.seen) == (read_reference(tmp_path / "s.npz", Colours(), store, 4).digest, 0)
    np.savez(tmp_path / "s.npz", arr_0=IMAGES[1:])
    assert identify(tmp_path / "s.npz", extractor) != before
    for name, content in {"empty": {"other": np.ones(1)}, "adm": {"mu": np.zeros(3), "sigma": np.eye(3)}}.items():
        np.savez(tmp_path / f"{name}.npz", **content)
        with pytest.raises(DataError, match=r"evaluate\.reference"):
            identify(tmp_path / f"{name}.npz", extractor)
