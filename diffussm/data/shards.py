"""Single latent shards: written for one unit of work, read for inspection. A door to mosaicml-streaming."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffussm.checkpoint.store import NotFound, Store
from diffussm.data.mds import MDSWriter, get_hash, reader_from_json
from diffussm.errors import StorageError

HASHES = ["sha1", "xxh64"]
"""Digests of each shard in the index; sorted, as streaming wants them. Readers check the second."""
Shard = dict[str, Any]
"""One shard's record in the index, as streaming writes it."""


@contextlib.contextmanager
def unit_writer(folder: Path, columns: Mapping[str, str], shard_bytes: int) -> Iterator[MDSWriter]:
    """A writer of samples into shards below `folder`; the index is written only when all went well.

    Raises:
        StorageError: the scratch folder cannot be written.
    """
    writer = MDSWriter(out=str(folder), columns=dict(columns), hashes=HASHES, size_limit=shard_bytes)
    try:
        yield writer
        writer.finish()
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be written ({error.strerror or error})", "make room in the temporary folder (TMPDIR)"
        ) from error
    finally:
        writer.cancel_future_jobs()  # its threads would outlive a failure


def publish(store: Store, folder: Path, unit: int) -> list[Shard]:
    """Upload a unit's shards under names of their own; returns their records. Raises StorageError."""
    shards: list[Shard] = json.loads((folder / "index.json").read_text())["shards"]
    for number, shard in enumerate(shards):
        path = folder / shard["raw_data"]["basename"]
        shard["raw_data"]["basename"] = f"shard.{unit:06d}.{number:03d}.mds"
        store.upload(path, shard["raw_data"]["basename"])
        path.unlink()
    return shards


def index_json(shards: list[Shard]) -> bytes:
    """The index over `shards`, in their order, as streaming reads it."""
    return json.dumps({"shards": shards, "version": 2}, sort_keys=True).encode()


def check(store: Store, shard: Shard, scratch: Path) -> str:
    """What is wrong with a stored shard: empty if every byte is as it was written. Raises StorageError."""
    name, size = shard["raw_data"]["basename"], shard["raw_data"]["bytes"]
    try:
        path = store.fetch(name, scratch)
    except NotFound:
        return f"{name} is missing"
    data = path.read_bytes()
    if path.is_relative_to(scratch):
        path.unlink()
    if len(data) != size:
        return f"{name} has {len(data):,} bytes of {size:,}"
    for kind, written in shard["raw_data"]["hashes"].items():
        if (found := get_hash(kind, data)) != written:
            return f"{name} has {kind} {found}, written was {written}"
    return ""


def read(store: Store, shard: Shard, scratch: Path) -> Iterator[dict[str, Any]]:
    """The samples of a stored shard. Raises StorageError."""
    folder = store.fetch(shard["raw_data"]["basename"], scratch).parent
    reader = reader_from_json(str(folder), "", shard)
    for position in range(reader.size):
        yield reader[position]
