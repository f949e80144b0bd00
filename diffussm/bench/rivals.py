"""What the reader of latents is measured against: one `.npy` a sample in a folder, and WebDataset tars.

Both hold the same latents and hand over the same batches: shuffled, as fp32 tensors, each rank its share.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from diffussm.checkpoint.store import Store, open_store
from diffussm.data.cursor import Batch
from diffussm.data.records import Records
from diffussm.errors import MissingError

SHUFFLE_BUFFER = 1000
"""Samples among which WebDataset shuffles, as its examples do."""


def write_npy(folder: Path, rows: Records) -> None:
    """A `.npy` of the moments and one of the label for each sample, as fast-DiT's `extract_features.py` leaves them."""
    for part in ("features", "labels"):
        (folder / part).mkdir(parents=True)
    for position, row in enumerate(rows):
        np.save(folder / "features" / f"{position}.npy", _moments(row))
        np.save(folder / "labels" / f"{position}.npy", row["label"])


class NpyFolder(Dataset[tuple[int, Any, int]]):
    """Samples of `write_npy`: (id, moments (K, C, H, W), label)."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, position: int) -> tuple[int, Any, int]:
        name = f"{position}.npy"
        features = np.load(self.folder / "features" / name)
        return position, features, int(np.load(self.folder / "labels" / name))


def npy_batches(folder: Path, number: int, rank_batch: int, rank: int, ranks: int) -> Iterator[Batch]:
    """Endless batches of one rank through a torch DataLoader in this process."""
    dataset = NpyFolder(folder, number)
    sampler = DistributedSampler(dataset, ranks, rank, shuffle=True, drop_last=True)  # type: ignore[var-annotated]
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from DataLoader(dataset, rank_batch, sampler=sampler, drop_last=True, collate_fn=_collate)
        epoch += 1


def write_tars(store: Store, rows: Records, tar_bytes: int) -> list[str]:
    """Tars of `KEY.npy` (moments) and `KEY.cls` (label) up to a size each; returns their keys."""
    names, buffer, tar = list[str](), io.BytesIO(), None
    for position, row in enumerate(rows):
        if tar is None:
            buffer = io.BytesIO()
            tar = tarfile.open(fileobj=buffer, mode="w")  # noqa: SIM115 - closed when it is full
        moments = io.BytesIO()
        np.save(moments, _moments(row))
        for ending, content in (("npy", moments.getvalue()), ("cls", str(row["label"]).encode())):
            entry = tarfile.TarInfo(f"{position:08d}.{ending}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        if buffer.tell() >= tar_bytes or position + 1 == len(rows):
            tar.close()
            names.append(f"tars/{len(names):06d}.tar")
            store.write(names[-1], buffer.getvalue())
            tar = None
    return names


def tar_batches(
    url: str, names: list[str], cache: Path, rank_batch: int, rank: int, ranks: int
) -> Iterator[Batch]:  # fmt: skip
    """Endless batches of one rank by the package webdataset; tars are kept in `cache` after their first reading.

    Raises:
        MissingError: the package is not installed.
    """
    try:
        import webdataset
    except ImportError as error:
        raise MissingError(
            "bench data: the package webdataset is not installed", "pip install 'diffussm[dev]'"
        ) from error
    store = open_store(url)

    def opened(url: str, mode: str = "rb", bufsize: int = 8192, **_: Any) -> Any:
        name = url.removeprefix("latents:")
        local = cache / name
        if not local.is_file():
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(store.read(name))
        return local.open("rb")

    webdataset.gopen_schemes["latents"] = opened
    mine = names[rank::ranks]
    stages = webdataset.DataPipeline(
        webdataset.ResampledShards([f"latents:{name}" for name in mine]),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(SHUFFLE_BUFFER),
        webdataset.decode(),
        webdataset.to_tuple("__key__", "npy", "cls"),
        webdataset.batched(rank_batch, collation_fn=_collate, partial=False),
    )
    yield from DataLoader(stages, batch_size=None)


def _moments(row: Any) -> Any:
    """(K, C, H, W) of one row's moments."""
    return np.stack([row[name] for name in row.dtype.names if name not in ("id", "label")])


def _collate(samples: list[tuple[Any, Any, int]]) -> Batch:
    ids, moments, labels = zip(*samples, strict=True)
    stacked = torch.from_numpy(np.stack(moments).astype(np.float32))  # (B, K, C, H, W)
    parts = [part.contiguous() for part in stacked.unbind(1)]
    zeros = torch.zeros_like(parts[0])
    four = parts if len(parts) == 4 else [parts[0], zeros, parts[-1], zeros]
    return Batch(torch.tensor([int(i) for i in ids]), torch.tensor(labels), *four)
