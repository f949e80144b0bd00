"""The samples of one latent shard (MDS) as an array, decoded a batch at a time.

streaming decodes one sample after another and opens the file for each. All columns of a latent shard have fixed sizes,
so its samples are rows of equal length, which NumPy can map and gather at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from diffussm.data.cursor import Batch
from diffussm.data.mds import MDSReader
from diffussm.errors import DataError

ALGORITHM = "xxh64"
"""Digest of the index by which shards are verified."""

Records = np.ndarray[Any, Any]


def reader_of(shard: dict[str, Any], folder: Path) -> MDSReader:
    """A shard from its record in the index."""
    return MDSReader.from_json(str(folder), None, shard)


def layout(shard: MDSReader) -> np.dtype[Any]:
    """The row that the columns of a shard make.

    Raises:
        DataError: they are not those of latents.
    """
    fields = []
    for name, encoding in zip(shard.column_names, shard.column_encodings, strict=True):
        kind, _, rest = encoding.partition(":")
        if kind == "int":
            fields.append((name, "<i8"))
        elif kind == "ndarray" and rest.count(":") == 1:
            dtype, shape = rest.split(":")
            fields.append((name, np.dtype(dtype).str, tuple(map(int, shape.split(",")))))  # type: ignore[arg-type]
        else:
            raise _malformed(shard, f"column {name} is {encoding}")
    row = np.dtype(fields)
    if not {"id", "label", "mean"} <= set(row.names or ()) or row.itemsize != sum(filter(None, shard.column_sizes)):
        raise _malformed(shard, f"columns are {shard.column_names}")
    return row


def verify(shard: MDSReader, path: Path) -> None:
    """Hold a file against the digest of the index.

    Raises:
        DataError: it differs.
    """
    wanted = shard.raw_data.hashes.get(ALGORITHM)
    if wanted is None:
        raise _malformed(shard, f"the index has no {ALGORITHM} digest of it")
    with path.open("rb") as file:
        found = xxhash.xxh64()
        while block := file.read(1 << 22):
            found.update(block)
    if found.hexdigest() != wanted:
        raise DataError(
            f"data.latents: shard {shard.raw_data.basename} is corrupt: found {ALGORITHM} {found.hexdigest()} in "
            f"{path} ({path.stat().st_size} bytes); the index says {wanted} ({shard.raw_data.bytes} bytes)",
            "remove the file if it is in a cache; otherwise make the latents again with `diffussm prepare`",
        )


def open_records(shard: MDSReader, path: Path) -> Records:
    """The rows of a verified shard, mapped from its file. They stay readable when the file is removed.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: its digest differs, or its rows are not those of latents.
    """
    verify(shard, path)
    row = layout(shard)
    offsets = np.fromfile(path, np.uint32, count=shard.samples + 2)
    # The head of an MDS file: number of samples, then where each begins, and where the last one ends.
    begin, end = int(offsets[1]), int(offsets[-1])
    if offsets[0] != shard.samples or end - begin != shard.samples * row.itemsize:
        raise _malformed(shard, f"{offsets[0]} samples in {end - begin} bytes, rows of {row.itemsize}")
    return np.memmap(path, row, mode="r", offset=begin, shape=(shard.samples,))


def batch_of(rows: Records, id_offset: int = 0) -> Batch:
    """Rows of shards as one batch of writable tensors, moments as fp32.

    A shard that keeps one drawn sample has no deviations: they are zero.
    """
    names = rows.dtype.names or ()

    def moment(name: str) -> torch.Tensor:
        if name in names:
            return torch.from_numpy(rows[name].astype(np.float32))  # (B, C, H, W)
        return torch.zeros(rows["mean"].shape)  # (B, C, H, W)

    ids, labels = (torch.from_numpy(rows[name].astype(np.int64)) for name in ("id", "label"))  # (B,) each
    return Batch(ids + id_offset, labels, moment("mean"), moment("std"), moment("mean_flip"), moment("std_flip"))


def _malformed(shard: MDSReader, why: str) -> DataError:
    return DataError(
        f"data.latents: {shard.raw_data.basename} is no shard of latents ({why})",
        "make the latents again with `diffussm prepare`",
    )
