"""Rows of a shard, held against streaming's own decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import MDSWriter
from streaming.base.format import reader_from_json

from diffussm.data import records
from diffussm.errors import DataError

SHAPE = (2, 3, 3)
MOMENT = "ndarray:float16:2,3,3"


def shards(folder: Path, columns: dict[str, str], **options: Any) -> list[Any]:
    """Ten samples with these columns; returns the shards' readers."""
    import json

    rng = np.random.default_rng(0)
    with MDSWriter(out=str(folder), columns=columns, **({"hashes": ["xxh64"]} | options)) as writer:
        for i in range(10):
            moments = {
                name: rng.normal(size=SHAPE).astype(np.float16) for name in columns if "mean" in name or "std" in name
            }
            writer.write({"id": 100 + i, "label": i % 3} | moments | ({"text": "x" * i} if "text" in columns else {}))
    index = json.loads((folder / "index.json").read_text())
    return [reader_from_json(str(folder), None, shard) for shard in index["shards"]]


def columns(*moments: str) -> dict[str, str]:
    return {"id": "int", "label": "int"} | dict.fromkeys(moments, MOMENT)


def test_rows_are_what_streaming_decodes(tmp_path: Path) -> None:
    (shard,) = shards(tmp_path / "a", columns("mean", "std", "mean_flip", "std_flip"))
    rows = records.open_records(shard, Path(shard.dirname) / shard.raw_data.basename)
    batch = records.batch_of(rows[[3, 0, 9]], id_offset=1000)
    assert batch.id.tolist() == [1103, 1100, 1109]
    assert batch.label.tolist() == [0, 0, 0]
    for name in ("mean", "std", "mean_flip", "std_flip"):
        found = getattr(batch, name)
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), np.stack([shard[i][name] for i in (3, 0, 9)]).astype(np.float32))
        found.add_(1)  # writable


def test_rows_outlive_their_file(tmp_path: Path) -> None:
    (shard,) = shards(tmp_path / "a", columns("mean"))
    path = Path(shard.dirname) / shard.raw_data.basename
    expected = shard[9]["mean"]
    rows = records.open_records(shard, path)
    path.unlink()
    np.testing.assert_array_equal(rows[9]["mean"], expected)
    with pytest.raises(FileNotFoundError):
        records.open_records(shard, path)


def test_a_stored_sample_has_no_deviation(tmp_path: Path) -> None:
    (shard,) = shards(tmp_path / "a", columns("mean", "mean_flip"))
    batch = records.batch_of(records.open_records(shard, Path(shard.dirname) / shard.raw_data.basename)[:4])
    assert batch.std.shape == batch.mean.shape == (4, *SHAPE)
    assert not batch.std.any()
    assert not batch.std_flip.any()


@pytest.mark.parametrize("damage", ["cut", "flipped", "longer"])
def test_damage_is_found_and_named(tmp_path: Path, damage: str) -> None:
    (shard,) = shards(tmp_path / "a", columns("mean"))
    path = Path(shard.dirname) / shard.raw_data.basename
    content = path.read_bytes()
    damaged = {"cut": content[:-1], "flipped": content[:-1] + bytes([content[-1] ^ 1]), "longer": content + b"x"}
    path.write_bytes(damaged[damage])
    with pytest.raises(DataError, match=rf"shard {path.name} is corrupt: found xxh64"):
        records.open_records(shard, path)


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (columns("mean") | {"text": "str"}, {}),
        (columns("std"), {}),
        (columns("mean"), {"hashes": ["sha1"]}),
    ],
)
def test_shards_of_something_else_are_refused(tmp_path: Path, made: dict[str, str], options: dict[str, Any]) -> None:
    (shard,) = shards(tmp_path / "a", made, **options)
    with pytest.raises(DataError, match="is no shard of latents"):
        records.open_records(shard, Path(shard.dirname) / shard.raw_data.basename)
