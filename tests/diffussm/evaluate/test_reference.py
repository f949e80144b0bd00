from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from diffussm.checkpoint.store import Store, open_store
from diffussm.errors import DataError
from diffussm.evaluate.extractors import Features
from diffussm.evaluate.metrics import frechet, kid
from diffussm.evaluate.reference import Reference, members, prepare_reference
from tests.diffussm.evaluate.test_extractors import Colours


class Source:
    """`count` small pictures in batches of `batch`, counting passes."""

    def __init__(self, count: int, batch: int = 7, seed: int = 0) -> None:
        self.images = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        self.batch = batch
        self.passes = 0

    def __call__(self) -> Iterator[np.ndarray]:
        self.passes += 1
        for start in range(0, len(self.images), self.batch):
            yield self.images[start : start + self.batch]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def prepare(
    store: Store, source: Source, n: int, extractor: Colours | None = None, data: str = "d", count: int | None = None
) -> Reference:
    extractor = extractor or Colours()
    return prepare_reference(store, extractor, source, count=count or len(source.images), n=n, data=data)


def floors(reference: Reference) -> dict[str, float]:
    assert reference.floor is not None
    return dict(reference.floor.values)


def test_moments_are_of_all_pictures_and_do_not_depend_on_batches(store: Store, tmp_path: Path) -> None:
    a = prepare(store, Source(40, batch=7), 10)
    b = prepare(open_store(str(tmp_path / "b")), Source(40, batch=40), 10)
    x = Source(40).images.mean((1, 2))
    for found in (a, b):
        mean, covariance = found.side.statistics["pool"]
        assert found.n == 40
        np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(covariance, np.cov(x.T), rtol=1e-5)
        np.testing.assert_allclose(found.side.features, x[members(40)], rtol=1e-6)
        assert len(found.side.features) == 20
    assert floors(a) == pytest.approx(floors(b), rel=1e-9)


@pytest.mark.parametrize(("n", "one"), [(2, 2), (10, 10), (20, 20), (21, 20), (40, 20), (10_000, 20)])
def test_the_floor_compares_disjoint_pictures_and_states_its_sizes(store: Store, n: int, one: int) -> None:
    floor = prepare(store, Source(40), n).floor
    assert floor is not None
    assert (floor.n, floor.rest) == (one, 40 - one)


def test_the_floor_is_the_distance_of_drawn_pictures_from_the_others(store: Store) -> None:
    source = Source(40)
    # Colour says which picture it is, so that the extractor can tell which ones were drawn.
    source.images[:] = np.arange(40, dtype=np.uint8)[:, None, None, None]
    prepare(store, source, 10)
    drawn: list[int] = []

    class Watching(Colours):
        def _extract(self, images: np.ndarray) -> Features:
            drawn.extend(images[:, 0, 0, 0].tolist())
            return super()._extract(images)

    found = floors(prepare(store, source, 15, Watching()))
    assert len(drawn) == len(set(drawn)) == 15  # no more than these pass through the network again
    assert not set(drawn) & set(np.flatnonzero(members(40)).tolist())
    colour = source.images.mean((1, 2))
    one, other = colour[drawn], np.delete(colour, drawn, axis=0)
    expected = frechet(one.mean(axis=0), np.cov(one.T), other.mean(axis=0), np.cov(other.T))
    assert found["frechet"] == pytest.approx(expected, rel=1e-6)
    assert found["frechet"] > 0
    assert found["kernel"] == pytest.approx(kid(colour[members(40)], one), rel=1e-6)


def test_both_ways_to_a_floor_give_one_value(store: Store, tmp_path: Path) -> None:
    source = Source(60)
    at_once = prepare(open_store(str(tmp_path / "once")), source, 25)
    prepare(store, source, 10)
    assert floors(prepare(store, source, 25)) == pytest.approx(floors(at_once), rel=1e-9)


def test_a_second_call_reads_the_store(store: Store) -> None:
    source, extractor = Source(40), Colours()
    first = prepare(store, source, 10, extractor)
    assert (source.passes, extractor.seen) == (1, 40)
    second = prepare(store, source, 10, extractor)
    assert (source.passes, extractor.seen) == (1, 40)
    assert second.floor == first.floor
    assert second.digest == first.digest
    assert np.array_equal(second.side.statistics["pool"][1], first.side.statistics["pool"][1])
    assert np.array_equal(second.side.features, first.side.features)
    prepare(store, source, 30, extractor)
    assert (source.passes, extractor.seen) == (2, 60)
    prepare(store, source, 10, extractor)
    prepare(store, source, 35, extractor)  # its floor is that of 20, which is known
    assert source.passes == 2
    card = json.loads(store.read("reference-c0ffee.json"))
    assert set(card["floors"]) == {"10", "20"}
    assert (card["extractor"], card["images"]) == ("colours", 40)


def test_other_pictures_make_a_new_reference(store: Store) -> None:
    prepare(store, Source(40), 10)
    other = Source(40, seed=1)
    found = prepare(store, other, 10, data="e")
    assert other.passes == 1
    np.testing.assert_allclose(found.side.statistics["pool"][0], other.images.mean((0, 1, 2)), rtol=1e-6)
    smaller = Source(30)
    assert prepare(store, smaller, 10, data="e").n == 30
    assert list(json.loads(store.read("reference-c0ffee.json"))["floors"]) == ["10"]


def test_extractors_do_not_share_a_file(store: Store) -> None:
    prepare(store, Source(40), 10)
    other = Colours()
    other.digest = "decade"
    source = Source(40)
    prepare(store, source, 10, other)
    assert source.passes == 1
    assert len(list(store.keys("reference-"))) == 4


@pytest.mark.parametrize("count", [39, 41, 33, 47])
def test_a_pass_that_yields_another_number_is_refused_and_leaves_nothing(store: Store, count: int) -> None:
    with pytest.raises(DataError, match=f"expected {count}"):
        prepare(store, Source(40), 10, count=count)
    assert list(store.keys()) == []


def test_moments_without_their_card_do_not_count(store: Store) -> None:
    prepare(store, Source(40), 10)
    store.delete("reference-c0ffee.json")
    source = Source(40)
    prepare(store, source, 10)
    assert source.passes == 1


def test_broken_files_are_refused_by_name(store: Store) -> None:
    source = Source(40)
    prepare(store, source, 10)
    card, blob = store.read("reference-c0ffee.json"), store.read("reference-c0ffee.safetensors")
    flipped = blob[:-1] + bytes([blob[-1] ^ 1])
    for key, broken in [
        ("reference-c0ffee.safetensors", flipped),
        ("reference-c0ffee.safetensors", None),
        ("reference-c0ffee.json", b"{"),
        ("reference-c0ffee.json", b"[]"),
        ("reference-c0ffee.json", b"{}"),
    ]:
        store.write("reference-c0ffee.json", card)
        store.write("reference-c0ffee.safetensors", blob)
        if broken is None:
            store.delete(key)
        else:
            store.write(key, broken)
        with pytest.raises(DataError, match=key) as caught:
            prepare(store, source, 10)
        assert "delete" in caught.value.remedy
    assert source.passes == 1


@pytest.mark.parametrize(("count", "n"), [(3, 10), (40, 1), (40, 0)])
def test_too_few_pictures_are_refused(store: Store, count: int, n: int) -> None:
    with pytest.raises(DataError, match=f"{count} real and {n} generated"):
        prepare(store, Source(count), n)
