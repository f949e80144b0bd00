from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffussm.checkpoint.store import Store, open_store
from diffussm.errors import DataError
from diffussm.evaluate import blocks
from diffussm.evaluate.blocks import Plan
from tests.diffussm.evaluate.test_extractors import Colours

PLAN = Plan(labels=tuple(i % 3 for i in range(23)), block=8, batch=3, extract_batch=5, settings={"seed": 1})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


class Painting:
    """Pictures whose colour says index and label; remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, labels: Sequence[int], first: int) -> np.ndarray:
        self.calls.append((first, len(labels)))
        colours = [(first + i, label, 7) for i, label in enumerate(labels)]
        return np.array(colours, np.uint8)[:, None, None, :].repeat(4, 1).repeat(4, 2)


def every(store: Store, order: Sequence[int], pictures: bool = False) -> np.ndarray:
    for index in order:
        blocks.make(store, PLAN, index, Painting(), Colours(), pictures)
    return np.concatenate([part["pool"] for part in blocks.features(store, PLAN, {"pool": 3})])


def test_blocks_hold_all_pictures_in_order_whoever_makes_them_when(store: Store, tmp_path: Path) -> None:
    found = every(store, [2, 0, 1])
    assert np.array_equal(found, [(i, i % 3, 7) for i in range(23)])
    assert np.array_equal(found, every(open_store(str(tmp_path / "other")), [0, 1, 2]))
    assert blocks.missing(store, PLAN) == []


def test_no_batch_reaches_over_the_border_of_a_block(store: Store) -> None:
    painting = Painting()
    for index in range(PLAN.count):
        report = blocks.make(store, PLAN, index, painting, Colours())
        assert report.images == len(PLAN.span(index))
    assert painting.calls == [(0, 3), (3, 3), (6, 2), (8, 3), (11, 3), (14, 2), (16, 3), (19, 3), (22, 1)]


def test_a_killed_evaluation_lacks_only_what_was_not_made(store: Store) -> None:
    blocks.make(store, PLAN, 1, Painting(), Colours())
    assert blocks.missing(store, PLAN) == [0, 2]
    assert blocks.missing(store, PLAN, pictures=True) == [0, 1, 2]
    with pytest.raises(DataError, match=r"000000\.safetensors"):
        list(blocks.features(store, PLAN, {"pool": 3}))


def test_other_settings_share_no_block(store: Store) -> None:
    blocks.make(store, PLAN, 1, Painting(), Colours())
    for change in ({"settings": {"seed": 2}}, {"block": 9}, {"batch": 4}, {"extract_batch": 6}, {"labels": (0,) * 23}):
        assert 1 in blocks.missing(store, replace(PLAN, **change)), change  # type: ignore[arg-type]


@pytest.mark.parametrize("broken", [b"", b"junk", None])
def test_a_broken_block_is_made_anew_by_the_next_start(store: Store, broken: bytes | None) -> None:
    every(store, [0, 1, 2])
    whole = store.read(PLAN.key(1))
    store.write(PLAN.key(1), whole[:-4] if broken is None else broken)
    with pytest.raises(DataError, match="000001"):
        list(blocks.features(store, PLAN, {"pool": 3}))
    assert blocks.missing(store, PLAN) == [1]


def test_pictures_come_back_and_everything_can_be_deleted(store: Store) -> None:
    every(store, [0, 1, 2], pictures=True)
    drawn = np.concatenate(list(blocks.pictures(store, PLAN)))
    assert np.array_equal(drawn[:, 2, 3, 0], np.arange(23))
    sheet = Image.open(io.BytesIO(blocks.preview(store, PLAN, ["a", "b", "c"], 2, "")))
    assert {sheet.getpixel((x, y))[:2] for x in range(0, sheet.width, 3) for y in range(0, sheet.height, 3)} >= {
        (0, 0), (3, 0), (1, 1), (4, 1), (2, 2), (5, 2),
    }  # fmt: skip
    blocks.delete(store, PLAN)
    assert list(store.keys()) == []


def test_the_preview_shows_a_class_with_few_pictures(store: Store) -> None:
    plan = replace(PLAN, labels=(0, 0, 0, 1))
    blocks.make(store, plan, 0, Painting(), Colours())
    sheet = np.asarray(Image.open(io.BytesIO(blocks.preview(store, plan, ["a", "b"], 3, ""))).convert("RGB"))
    for label, shown in ((0, [0, 1, 2]), (1, [3])):
        # Red is the picture's index, green its label, blue always 7.
        of_label = (sheet[..., 2] == 7) & (sheet[..., 1] == label)
        assert sorted(set(sheet[of_label][:, 0])) == shown
