from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffussm.data.cursor import Batch, Cursor, epoch_images
from diffussm.errors import DataError


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 300))
def test_cursor_counts_whole_batches(global_batch: int, extra: int, steps: int) -> None:
    number = global_batch + extra
    per_epoch = number // global_batch
    cursor = Cursor()
    for _ in range(steps):
        cursor = cursor.after_batch(number, global_batch)
    assert cursor == Cursor(steps // per_epoch, steps % per_epoch * global_batch)


def test_end_of_an_epoch_is_the_beginning_of_the_next() -> None:
    assert Cursor(2, 20).normalised(23, 10) == Cursor(3, 0)
    assert Cursor(2, 10).normalised(23, 10) == Cursor(2, 10)
    assert Cursor(2, 20).after_batch(23, 10) == Cursor(3, 10)


@pytest.mark.parametrize("cursor", [Cursor(0, 5), Cursor(0, 30), Cursor(0, -10), Cursor(-1, 0)])
def test_impossible_positions_are_refused(cursor: Cursor) -> None:
    with pytest.raises(DataError, match="data cursor"):
        cursor.normalised(23, 10)


def test_epoch_leaves_out_the_incomplete_batch() -> None:
    assert epoch_images(23, 10) == 20
    assert epoch_images(20, 10) == 20
    with pytest.raises(DataError, match=r"train\.global_batch: found 24; the latents hold 23"):
        epoch_images(23, 24)


def test_batch_splits_in_order() -> None:
    moments = [torch.randn(5, 2, 4, 4) for _ in range(4)]
    batch = Batch(torch.arange(5), torch.arange(5) + 10, *moments)
    parts = batch.split(2)
    assert [len(part) for part in parts] == [2, 2, 1]
    assert [part.id.tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert parts[2].label.tolist() == [14]
    assert torch.equal(parts[1].std_flip, moments[3][2:4])


def test_a_fingerprint_depends_on_samples_and_epoch_and_on_nothing_else() -> None:
    def batch(*ids: int) -> Batch:
        moments = torch.zeros(len(ids), 1, 1, 1)
        numbers = torch.tensor(ids, dtype=torch.int64)
        return Batch(numbers, numbers, moments, moments, moments, moments)

    whole = batch(3, 1, 4, 15).fingerprint(epoch=2)
    parts = batch(15, 3).fingerprint(epoch=2) + batch(4, 1).fingerprint(epoch=2)
    assert (whole - parts) % (1 << 64) == 0
    others = [batch(3, 1, 4, 16).fingerprint(2), batch(3, 1, 4, 15).fingerprint(3), batch(3, 1, 4, 4).fingerprint(2)]
    assert whole not in others
    assert len(set(others)) == 3
