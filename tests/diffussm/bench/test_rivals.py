"""The other sides hand over what the reader does: every sample of a rank's share, unchanged."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from diffussm.bench import rivals
from diffussm.checkpoint.store import open_store
from diffussm.data.records import Records, batch_of

MOMENTS = ("mean", "std", "mean_flip", "std_flip")
ROW = np.dtype([("id", "<i8"), ("label", "<i8"), *((name, "<f2", (2, 3, 3)) for name in MOMENTS)])


@pytest.fixture
def rows() -> Records:
    made = np.zeros(40, ROW)
    rng = np.random.default_rng(0)
    made["id"], made["label"] = np.arange(40), np.arange(40) % 3
    for name in ("mean", "std", "mean_flip", "std_flip"):
        made[name] = rng.normal(size=made[name].shape)
    return made


def check(batch: object, rows: Records) -> None:
    expected = batch_of(rows[batch.id.numpy()])  # type: ignore[attr-defined]
    for name in ("id", "label", "mean", "std", "mean_flip", "std_flip"):
        np.testing.assert_array_equal(getattr(batch, name).numpy(), getattr(expected, name).numpy())


def test_npy_folder(rows: Records, tmp_path: Path) -> None:
    rivals.write_npy(tmp_path, rows)
    seen = []
    for rank in range(2):
        batches = list(itertools.islice(rivals.npy_batches(tmp_path, 40, 5, rank, 2), 4))
        for batch in batches:
            check(batch, rows)
            seen += batch.id.tolist()
    assert sorted(seen) == list(range(40))


def test_tars(rows: Records, tmp_path: Path) -> None:
    names = rivals.write_tars(open_store(str(tmp_path / "store")), rows, 8192)
    assert len(names) > 2
    seen = set()
    batches = rivals.tar_batches(str(tmp_path / "store"), names, tmp_path / "cache", 5, 0, 1)
    for batch in itertools.islice(batches, 60):
        check(batch, rows)
        seen |= set(batch.id.tolist())
    assert len(seen) == 40
    assert list((tmp_path / "cache").rglob("*.tar"))
