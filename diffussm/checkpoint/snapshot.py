"""One rank's slices, copied inside the step into memory that each save uses again: a safetensors file to be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffussm.checkpoint import digest
from diffussm.checkpoint.manifest import Piece
from diffussm.checkpoint.source import Source

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
WIDTHS = {name: dtype.itemsize for dtype, name in DTYPES.items()}
"""Bytes of an element."""


@dataclass(frozen=True)
class Part:
    """One parameter's slice on this rank: where it lies in the flattened parameter, and its tensors by kind."""

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: Mapping[str, Tensor]
    """kind -> (numel,), fp32 in checkpoints."""

    @property
    def numel(self) -> int:
        """Elements of the slice; the same for each kind."""
        return next(iter(self.tensors.values())).numel()


class Snapshot:
    """Host memory for one rank's slices, laid out as the data of its safetensors file: kind by kind, part by part.

    It holds as many bytes as the rank's own slices and is allocated once. Pinned when the state lies on a GPU.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._entries: list[_Entry] = []
        self._views: list[Tensor] = []
        self.pieces: tuple[Piece, ...] = ()
        self.header = b""

    def prepare(self, parts: Sequence[Part]) -> None:
        """Allocate for these slices, unless that is done already, and touch the memory. Local."""
        entries = _entries(parts)
        if self.header and entries == self._entries:
            return
        self._entries = entries
        self.pieces = tuple(Piece(part.name, part.start, part.numel) for part in parts)
        on_gpu = any(t.device.type == "cuda" for part in parts for t in part.tensors.values())
        sizes = [entry.numel * entry.dtype.itemsize for entry in entries]
        self._buffer = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=on_gpu)
        raw = torch.split(self._buffer, sizes) if sizes else ()
        self._views = [view.view(entry.dtype) for view, entry in zip(raw, entries, strict=True)]
        self.header = safetensors_header([(entry.key, DTYPES[entry.dtype], entry.numel) for entry in entries])

    def take(self, parts: Sequence[Part]) -> None:
        """Copy the slices' present values. Local; returns when the copy is whole, so that the next step may begin."""
        self.prepare(parts)
        live = [parts[entry.part].tensors[entry.kind].detach() for entry in self._entries]
        with torch.no_grad():
            if live:
                torch._foreach_copy_(self._views, live, non_blocking=True)
            if any(tensor.device.type == "cuda" for tensor in live):
                torch.cuda.synchronize()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self._buffer.numel()

    @property
    def dtypes(self) -> dict[str, str]:
        """`kind/parameter` -> what its elements are, as safetensors names it."""
        return {entry.key: DTYPES[entry.dtype] for entry in self._entries}

    def source(self) -> Source:
        """The file's bytes; read from the snapshot's memory, so only until the next `take`."""
        data = [memoryview(self._buffer.numpy().data)] if self._buffer.numel() else []
        return Source([memoryview(self.header), *data])

    def sums(self) -> dict[str, int]:
        """`kind/parameter` -> digest of this rank's slice of it (see digest.slice_sum)."""
        return {
            entry.key: digest.slice_sum(view, entry.start)
            for entry, view in zip(self._entries, self._views, strict=True)
        }


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: a kind of a part."""

    kind: str
    name: str
    part: int
    start: int
    numel: int
    dtype: torch.dtype

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"


def _entries(parts: Sequence[Part]) -> list[_Entry]:
    """Kind by kind; those of 32 bits first, so that every tensor lies on a multiple of its width without gaps."""
    found = [
        _Entry(kind, part.name, index, part.start, part.numel, part.tensors[kind].dtype)
        for kind in (parts[0].tensors if parts else ())
        for index, part in enumerate(parts)
    ]
    return sorted(found, key=lambda entry: -entry.dtype.itemsize)


def safetensors_header(tensors: Sequence[tuple[str, str, int]]) -> bytes:
    """The beginning of a safetensors file of 1-D tensors, (name, dtype, elements) in the order of their data.

    The format: 8 bytes little-endian length of the JSON, the JSON padded with spaces, the data.
    """
    entries, position = {}, 0
    for name, dtype, numel in tensors:
        end = position + WIDTHS[dtype] * numel
        entries[name] = {"dtype": dtype, "shape": [numel], "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def parse_header(text: bytes) -> dict[str, tuple[int, int]]:
    """Name of each fp32 tensor -> (first, end) byte within the data, from the JSON of a safetensors header.

    Raises:
        ValueError: it is no such header.
    """
    try:
        entries = json.loads(text)
        return {
            name: (int(entry["data_offsets"][0]), int(entry["data_offsets"][1]))
            for name, entry in entries.items()
            if name != "__metadata__" and entry["dtype"] == "F32"
        }
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"not a safetensors header ({error!r})") from error
