"""A run's folder with snapshots or checkpoints of known weights, written without a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffussm.checkpoint.digest import digest_file
from diffussm.checkpoint.manifest import MANIFEST, Counters, File, Manifest, Piece

SHAPES = {"w": (6, 7), "b": (5,)}


def write(
    root: Path,
    prefix: str,
    images: int,
    state: dict[str, dict[str, torch.Tensor]],
    ranks: int = 2,
    dtype: torch.dtype = torch.float32,
    **facts: Any,
) -> Manifest:
    """State by kind and parameter, cut over ranks, below `root/prefix/<images>`."""
    folder = root / prefix / f"{images:012d}"
    folder.mkdir(parents=True)
    files = []
    for rank in range(ranks):
        pieces, tensors = [], {}
        for name, shape in SHAPES.items():
            numel = torch.empty(shape).numel()
            start, stop = rank * numel // ranks, (rank + 1) * numel // ranks
            pieces.append(Piece(name, start, stop - start))
            for kind, values in state.items():
                tensors[f"{kind}/{name}"] = values[name].flatten()[start:stop].to(dtype).contiguous()
        path = folder / f"attempt0001-rank{rank:05d}.safetensors"
        save_file(tensors, path)
        files.append(File(path.name, path.stat().st_size, digest_file(path), tuple(pieces)))
    at = Counters(images, images // 8, 0, images, images // 8, 0)
    manifest = Manifest(at, 1, ranks, 1, "d", tuple(state), dict(SHAPES), tuple(files), {"torch": "2"}, **facts)
    (folder / MANIFEST).write_bytes(manifest.to_json())
    return manifest
