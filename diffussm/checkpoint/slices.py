"""Any range of any tensor of a checkpoint, read by byte ranges: no file is fetched whole, no file is held."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from diffussm.checkpoint.manifest import Index, Manifest
from diffussm.checkpoint.store import Store
from diffussm.errors import DataError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies in its file."""

    offset: int
    dtype: torch.dtype


class Slices:
    """The tensors of one checkpoint. Several threads may read at once."""

    def __init__(self, store: Store, folder: str, manifest: Manifest) -> None:
        self.store, self.folder, self.manifest = store, folder, manifest
        self._index = Index(manifest.files)
        self._headers: dict[str, dict[str, _Tensor]] = {}
        self._lock = threading.Lock()

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter, (numel,) fp32, whatever they are stored as.

        Raises:
            DataError: the checkpoint has no such kind, or not these elements.
            NotFound, StorageError: a file cannot be read.
        """
        if kind not in self.manifest.kinds:
            raise DataError(
                f"{self.folder}: holds {', '.join(self.manifest.kinds)}, not {kind!r}", "choose one of those"
            )
        target = torch.empty(numel)
        for copy in self._index.copies(name, start, numel):
            place = self._find(copy.file, f"{kind}/{name}")
            width = place.dtype.itemsize
            first = place.offset + copy.source * width
            data = self._bytes(f"{self.folder}/{copy.file}", first, copy.numel * width)
            source = torch.frombuffer(bytearray(data), dtype=place.dtype)  # (copy.numel,)
            target[copy.target : copy.target + copy.numel].copy_(source)
        return target

    def _bytes(self, key: str, first: int, size: int) -> bytes:
        data = self.store.read_range(key, first, size)
        if len(data) != size:
            raise DataError(f"{key}: found {len(data):,} bytes of {size:,}, it is cut short", "use another checkpoint")
        return data

    def _find(self, file: str, tensor: str) -> _Tensor:
        with self._lock:
            if file not in self._headers:
                self._headers[file] = self._header(f"{self.folder}/{file}")
            found = self._headers[file].get(tensor)
        if found is None:
            raise DataError(f"{self.folder}/{file}: has no tensor {tensor}", "use another checkpoint")
        return found

    def _header(self, key: str) -> dict[str, _Tensor]:
        size = int.from_bytes(self._bytes(key, 0, 8), "little")
        try:
            entries = json.loads(self._bytes(key, 8, size))
            return {
                name: _Tensor(8 + size + entry["data_offsets"][0], _DTYPES[entry["dtype"]])
                for name, entry in entries.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{key}: not a safetensors file ({error!r})", "use another checkpoint") from error
