"""What one rank wants of a checkpoint's files, as ranges of bytes, and the filling of its tensors with them."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffussm.checkpoint.manifest import File, Index, Manifest
from diffussm.checkpoint.snapshot import Part, parse_header
from diffussm.checkpoint.source import BLOCK_BYTES
from diffussm.checkpoint.store import NotFound, Store
from diffussm.errors import DataError


@dataclass(frozen=True)
class Want:
    """Elements of one tensor of a file, from `source` on, that fill `target`, (numel,) fp32."""

    tensor: str
    source: int
    target: Tensor


@dataclass(frozen=True)
class _Range:
    """Bytes [start, stop) of a file that fill `target`, (stop - start,) uint8."""

    start: int
    stop: int
    target: Tensor


@dataclass
class Wants:
    """What is wanted, by file. Memory: the targets and one block."""

    by_file: dict[str, list[Want]]
    _ranges: dict[str, list[_Range]] = field(default_factory=dict)

    def open(self, store: Store, key: str, file: File) -> None:
        """Find out where in the file the wanted tensors lie. A header that makes no sense asks for nothing."""
        wanted = self.by_file.get(file.name, [])
        if not wanted:
            return
        with contextlib.suppress(ValueError):  # its digest will tell why, or `fetch_rest`
            self._ranges[file.name] = _locate(store, key, file, wanted)

    def offer(self, name: str, position: int, block: bytes) -> None:
        """Copy what is wanted of a file's bytes from `position` on. Blocks come in order and without gaps."""
        ranges = self._ranges.get(name, [])
        if not ranges or not block:
            return
        data = torch.frombuffer(bytearray(block), dtype=torch.uint8)
        for wanted in ranges[bisect_right(ranges, position, key=lambda r: r.stop) :]:
            if wanted.start >= position + len(block):
                break
            low, high = max(wanted.start, position), min(wanted.stop, position + len(block))
            wanted.target[low - wanted.start : high - wanted.start].copy_(data[low - position : high - position])

    def fetch_rest(self, store: Store, folder: str, manifest: Manifest) -> list[str]:
        """Read the wanted ranges of all files that were not offered; what is wrong with them."""
        wrong = []
        for file in manifest.files:
            wanted, key = self.by_file.get(file.name, []), f"{folder}/{file.name}"
            if not wanted or file.name in self._ranges:
                continue
            try:
                self._ranges[file.name] = _locate(store, key, file, wanted)
                for start, stop in _joined(self._ranges[file.name]):
                    for low in range(start, stop, BLOCK_BYTES):
                        block = store.read_range(key, low, min(stop - low, BLOCK_BYTES))
                        if len(block) != min(stop - low, BLOCK_BYTES):
                            raise ValueError(f"ends at byte {low + len(block):,}")
                        self.offer(file.name, low, block)
            except NotFound:
                wrong.append(f"{key} is missing")
            except ValueError as error:
                wrong.append(f"{key} cannot be read: {error}")
        return wrong


def plan(folder: str, manifest: Manifest, parts: Sequence[Part]) -> Wants:
    """Where each element of `parts` is to be had. Pure.

    Raises:
        DataError: a parameter or kind is missing, has another shape, or is not covered by the files.
    """
    absent = {kind for part in parts for kind in part.tensors} - set(manifest.kinds)
    if absent:
        raise DataError(f"{folder}: holds {', '.join(manifest.kinds)}, not {', '.join(sorted(absent))}")
    index, by_file = Index(manifest.files), dict[str, list[Want]]()
    for part in parts:
        saved = manifest.shapes.get(part.name)
        if saved != tuple(part.shape):
            raise DataError(
                f"{folder}: parameter {part.name} has shape {saved} in the checkpoint, {part.shape} in the model",
                "use the model settings of the run (its config.yaml), or another run name",
            )
        for copy in index.copies(part.name, part.start, part.numel):
            for kind, target in part.tensors.items():
                where = target.detach()[copy.target : copy.target + copy.numel]
                by_file.setdefault(copy.file, []).append(Want(f"{kind}/{part.name}", copy.source, where))
    return Wants(by_file)


def _locate(store: Store, key: str, file: File, wanted: Sequence[Want]) -> list[_Range]:
    """Wanted bytes of a file in rising order, from its safetensors header; ValueError if that makes no sense."""
    length = int.from_bytes(store.read_range(key, 0, 8), "little")
    if not 0 < length <= file.size - 8:
        raise ValueError("no safetensors header")
    offsets = parse_header(store.read_range(key, 8, length))
    ranges = []
    for want in wanted:
        if want.tensor not in offsets:
            raise ValueError(f"holds no fp32 tensor {want.tensor}")
        low, high = offsets[want.tensor]
        start = low + 4 * want.source
        stop = start + 4 * want.target.numel()
        if stop > high or 8 + length + high > file.size:
            raise ValueError(f"tensor {want.tensor} ends before element {want.source + want.target.numel()}")
        ranges.append(_Range(8 + length + start, 8 + length + stop, want.target.view(torch.uint8)))
    return sorted(ranges, key=lambda found: found.start)


def _joined(ranges: Sequence[_Range]) -> list[tuple[int, int]]:
    """Ranges that touch, as one: fewer requests."""
    joined: list[tuple[int, int]] = []
    for found in ranges:
        if joined and found.start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], found.stop))
        else:
            joined.append((found.start, found.stop))
    return joined
