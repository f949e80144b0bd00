"""Whole weights as one safetensors file by parameter name, written block by block, so that memory stays bounded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from diffussm.checkpoint.store import open_store
from diffussm.errors import DataError, StorageError
from diffussm.naming import is_remote

BLOCK = 1 << 22
"""Elements that are produced and written at a time."""
FORMAT = "diffussm-weights-1"

Produce = Callable[[str, int, int], Tensor]
"""(parameter, start, numel) -> elements [start, start + numel) of the flattened parameter, (numel,)."""


@dataclass(frozen=True)
class Weights:
    """Weights read back from a file."""

    tensors: dict[str, Tensor]
    """fp32, by parameter name, in the parameters' shapes."""
    images: int
    """Training images after which they stood."""
    metadata: dict[str, str]
    """What they are: run, kind, and how they were made."""


def write(
    target: str, shapes: Mapping[str, tuple[int, ...]], produce: Produce, images: int, metadata: Mapping[str, str]
) -> int:  # fmt: skip
    """Write fp32 weights to a file or an s3:// object, whole or not at all; returns its bytes.

    Args:
        target: where to; a file that is there is replaced.
        shapes: the parameters, in the order in which they are asked for and written.
        produce: gives their values, BLOCK elements at most at a time.
        images: training images after which the weights stood.
        metadata: what else the file says about itself.

    Raises:
        StorageError: the target cannot be written.
    """
    header = _header(shapes, {"format": FORMAT, "images": str(images), **metadata})
    with _beside(target) as path:
        try:
            with path.open("wb") as file:
                file.write(header)
                for name, shape in shapes.items():
                    for start in range(0, prod(shape), BLOCK):
                        block = produce(name, start, min(BLOCK, prod(shape) - start))  # (numel,)
                        file.write(block.to(torch.float32).contiguous().numpy().data)
                return file.tell()
        except OSError as error:
            raise StorageError(f"{target}: {error.strerror or error}", "choose another place") from error


def read(target: str) -> Weights:
    """Read weights that `write` wrote, from a file or an s3:// object.

    Raises:
        NotFound, StorageError: it cannot be read.
        DataError: it is no such file.
    """
    from safetensors import SafetensorError, safe_open

    store, key = open_store(target.rpartition("/")[0] or "."), target.rpartition("/")[2]
    with tempfile.TemporaryDirectory(prefix="diffussm-weights-") as scratch:
        path = store.fetch(key, Path(scratch))
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                if metadata.get("format") != FORMAT:
                    raise DataError(
                        f"{target}: found format {metadata.get('format')!r}; allowed: {FORMAT!r}",
                        "name a file that `diffussm ema` or `diffussm checkpoints --export` wrote",
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (SafetensorError, OSError) as error:
            raise DataError(f"{target}: not a safetensors file ({error})") from error
    return Weights(tensors, int(metadata["images"]), metadata)


def _header(shapes: Mapping[str, tuple[int, ...]], metadata: dict[str, str]) -> bytes:
    """The format's beginning: 8 bytes little-endian length, then JSON padded with spaces to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name, shape in shapes.items():
        end = position + 4 * prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def _beside(target: str) -> Iterator[Path]:
    """A local path to write to, which becomes the target when the block ends well and disappears otherwise."""
    if is_remote(target):
        place, _, name = target.rpartition("/")
        store = open_store(place)
        with tempfile.TemporaryDirectory(prefix="diffussm-weights-") as scratch:
            path = Path(scratch) / name
            yield path
            store.upload(path, name)
        return
    final = Path(target.removeprefix("file://"))
    path = final.with_name(f"{final.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{target}: {error.strerror or error}", "choose another place") from error
    try:
        yield path
        path.replace(final)
    finally:
        path.unlink(missing_ok=True)
