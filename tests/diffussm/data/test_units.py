from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffussm.config.schema import DataConfig
from diffussm.data.source import Entry, FileReader, ImageSource, Where
from diffussm.data.units import batch_size, plan, storage_order


def source(count: int, groups: int = 0, **where: int) -> ImageSource:
    entries = [Entry(f"{i}", i % 2, Where("f", i // groups if groups else 0, i)) for i in range(count)]
    return ImageSource(DataConfig(resolution_px=8), ["a", "b"], entries, FileReader(), groups_matter=bool(groups))


@given(st.integers(2, 60), st.integers(0, 7), st.integers(1, 20))
def test_every_picture_is_in_one_unit(count: int, groups: int, unit_images: int) -> None:
    whole = plan(source(count, groups), {}, unit_images)
    ids = [item.id for unit in whole.units for item in unit.items]
    assert sorted(ids) == list(range(count))
    assert whole.images == count
    assert [unit.number for unit in whole.units] == list(range(len(whole.units)))
    assert all(len(unit.items) == unit_images for unit in whole.units[:-1])


def test_without_groups_the_order_is_random_and_does_not_know_units() -> None:
    items = source(50).items
    order = storage_order(items, False, 10)
    assert order == storage_order(items, False, 7) != list(range(50))


def test_the_digest_knows_settings_names_labels_and_places() -> None:
    base = plan(source(10), {"a": 1}, 5).digest
    assert base == plan(source(10), {"a": 1}, 5).digest
    assert len({base, plan(source(10), {"a": 2}, 5).digest, plan(source(9), {"a": 1}, 5).digest}) == 3
    moved = source(10)
    moved.items[3] = type(moved.items[3])(3, "3", 1, Where("f", 1, 3))
    assert plan(moved, {"a": 1}, 5).digest != base


@pytest.mark.parametrize(
    ("asked", "side", "images", "size"),
    [
        (0, 32, 1000, 64), (0, 256, 1000, 64), (0, 512, 1000, 16), (0, 1024, 99, 4),
        (0, 8192, 9, 1), (7, 512, 99, 7), (0, 64, 9, 9),
    ],
)  # fmt: skip
def test_batches_shrink_with_the_area(asked: int, side: int, images: int, size: int) -> None:
    assert batch_size(asked, side, images) == size
