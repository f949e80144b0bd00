"""Pictures to latent shards, unit by unit, so that any number of processes share the work and a rerun goes on.

Each sample holds its id and label and the posterior's mean and standard deviation (or one sample), of the picture and
of its mirror image, scaled, in half precision. The order of the samples is random and fixed (`units.storage_order`).
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from diffussm.checkpoint.store import open_store
from diffussm.config.schema import Config, OnCorrupt, Precision, Stored
from diffussm.data import autoencoder, shards
from diffussm.data.ledger import Ledger, Record
from diffussm.data.passport import DTYPE, Skipped
from diffussm.data.picture import CorruptImageError, Decoded, Pixels
from diffussm.data.source import Item, Reader
from diffussm.data.units import Plan, Unit
from diffussm.errors import DataError
from diffussm.rng import Purpose, generator

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""
UNITS_AT_ONCE = 2
"""Units that a worker has in hand: one is decoded or uploaded while the other is encoded."""

_AHEAD = 2
"""Batches that are decoded ahead of the encoder, within a unit."""
_LARGEST = float(np.finfo(DTYPE).max)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; small, and the same for all."""

    cfg: Config
    place: str
    """Folder or URL of the latents."""
    plan: Plan
    """Settings and digest; its units are handed out one by one."""
    reader: Reader
    batch: int
    """Pictures in one pass of the encoder."""
    device: str


class Encoder:
    """One worker: encodes units with its own copy of the network. Units may be run from several threads."""

    def __init__(self, job: Job) -> None:
        """Load the network; raises DataError as `autoencoder.load`."""
        data = job.cfg.data
        self._job = job
        self._ledger = Ledger(open_store(job.place), job.plan)
        torch.set_num_threads(job.cfg.prepare.threads_per_worker)
        self._network = autoencoder.load(data.autoencoder).to(job.device)
        if data.encoder_precision is Precision.bf16:
            self._network.in_precision(torch.bfloat16)
        self._one_pass = threading.Lock()
        self._pool = ThreadPoolExecutor(job.cfg.prepare.decode_threads, thread_name_prefix="decode")
        self._scratch = _own_scratch(job.plan.digest)

    def close(self) -> None:
        """End the threads and remove the scratch folder."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def run(self, unit: Unit, progress: Callable[[int], None] = lambda more: None) -> Record:
        """Encode a unit and put its shards, then its record; a unit that is done already is only read.

        Args:
            unit: what to encode.
            progress: called with the number of pictures of each batch.

        Raises:
            CorruptImageError: a picture cannot be decoded and `data.on_corrupt` is fail.
            DataError: a picture's file is gone, or a latent does not fit half precision.
            StorageError: the place cannot be written.
        """
        record = self._ledger.find(unit.number)
        if record is not None:
            progress(len(unit.items))
            return record
        record = Record(self._job.plan.digest, unit.number)
        folder = self._scratch / f"{unit.number:06d}"
        try:
            self._encode(unit, record, folder, progress)
            record.shards = shards.publish(self._ledger.store, folder, unit.number) if record.elements else []
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return self._ledger.add(record)

    def _encode(self, unit: Unit, record: Record, folder: Path, progress: Callable[[int], None]) -> None:
        """Write the unit's samples into shards below `folder` and count them in `record`."""
        data = self._job.cfg.data
        side = data.resolution_px // self._network.downsampling
        moment = f"ndarray:{DTYPE}:{self._network.channels},{side},{side}"
        names = columns(data.stored, self._network.deterministic)
        converted: Counter[str] = Counter()
        with shards.unit_writer(
            folder, {"id": "int", "label": "int"} | dict.fromkeys(names, moment), data.shard_bytes
        ) as writer:
            for items, decoded, skipped in self._decoded(unit):
                record.skipped += skipped
                converted.update(word for picture in decoded for word in picture.converted)
                if items:
                    moments = self._moments(items, np.stack([picture.pixels for picture in decoded]))
                    for row, item in enumerate(items):
                        sample = {name: moments[name][row] for name in names}
                        _count(record, item.label, sample["mean"], sample.get("std"))
                        writer.write({"id": item.id, "label": item.label} | sample)
                progress(len(items) + len(skipped))
        record.converted = dict(sorted(converted.items()))

    def _decoded(self, unit: Unit) -> Iterator[tuple[list[Item], list[Decoded], list[Skipped]]]:
        """Decoded pictures a batch at a time, with those that were skipped; some batches are decoded ahead."""
        get = self._job.reader.open(unit.items)
        side = self._job.cfg.data.resolution_px

        def load(item: Item) -> Decoded | CorruptImageError:
            try:
                return self._job.reader.decode(get(item), side, item.name)
            except CorruptImageError as error:
                return error

        size = self._job.batch
        parts = (unit.items[start : start + size] for start in range(0, len(unit.items), size))
        futures = ([(item, self._pool.submit(load, item)) for item in part] for part in parts)
        waiting: list[list[tuple[Item, Future[Decoded | CorruptImageError]]]] = []
        try:
            for batch in itertools.chain(futures, itertools.repeat(None, _AHEAD)):
                if batch is not None:
                    waiting.append(batch)
                if waiting and (batch is None or len(waiting) > _AHEAD):
                    yield self._settled(waiting.pop(0))
        finally:
            for left in waiting:
                for _, future in left:
                    future.cancel()

    def _settled(
        self, batch: Sequence[tuple[Item, Future[Decoded | CorruptImageError]]]
    ) -> tuple[list[Item], list[Decoded], list[Skipped]]:
        kept, decoded, skipped = [], [], []
        for item, future in batch:
            result = future.result()
            if isinstance(result, Decoded):
                kept.append(item)
                decoded.append(result)
            elif self._job.cfg.data.on_corrupt is OnCorrupt.fail:
                raise result
            else:
                _logger.warning("skipped: %s", result.message)
                skipped.append(Skipped(item.name, result.message, result.kind))
        return kept, decoded, skipped

    def _moments(self, items: Sequence[Item], pictures: Pixels) -> dict[str, npt.NDArray[Any]]:
        """What is stored of pictures (B, H, W, 3) and of their mirror images: arrays (B, C, h, w) by column.

        The batch is filled up to its full size, because the sums inside a network may be taken in another order for
        another size: a picture's latent must not depend on its neighbours.
        """
        data, count = self._job.cfg.data, len(items)
        full = np.zeros((self._job.batch, *pictures.shape[1:]), np.uint8)
        full[:count] = pictures
        with (
            self._one_pass,
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            torch.set_num_threads(self._job.cfg.prepare.threads_per_worker)
            pairs = [self._network.encode(full), self._network.encode(np.ascontiguousarray(full[:, :, ::-1]))]
        found: dict[str, npt.NDArray[Any]] = {}
        for (mean, std), ending in zip(pairs, ("", "_flip"), strict=True):
            found["mean" + ending], found["std" + ending] = (part[:count].cpu().numpy() for part in (mean, std))
        if data.stored is Stored.sample:
            for row, item in enumerate(items):
                draws = generator(0, Purpose.ENCODE, item.id)
                for ending in ("", "_flip"):
                    mean_row = found["mean" + ending][row]  # (C, h, w)
                    noise = draws.standard_normal(mean_row.shape, np.float32)  # (C, h, w)
                    found["mean" + ending][row] = mean_row + found["std" + ending][row] * noise
        for name, values in found.items():
            largest = np.abs(values).max(axis=(1, 2, 3), initial=0)  # (B,)
            if largest.max() > _LARGEST:
                row = int(largest.argmax())
                raise DataError(
                    f"data.autoencoder: {name} of {items[row].name} reaches {largest[row]:.4g}; {DTYPE} holds up to "
                    f"{_LARGEST:.0f}",
                    "use an autoencoder whose latents are scaled to about unit variance",
                )
        return {name: values.astype(DTYPE) for name, values in found.items()}


def columns(stored: Stored, deterministic: bool) -> tuple[str, ...]:
    """Names of the latents' columns; deviations are left out where they are all zero."""
    if stored is Stored.sample or deterministic:
        return ("mean", "mean_flip")
    return ("mean", "std", "mean_flip", "std_flip")


def _count(record: Record, label: int, mean: npt.NDArray[Any], std: npt.NDArray[Any] | None) -> None:
    """Count one sample; the square of a posterior sample is mean^2 + std^2 on average."""
    mean = mean.astype(np.float64)
    record.class_counts[label] = record.class_counts.get(label, 0) + 1
    record.elements += mean.size
    record.total += float(mean.sum())
    record.squares += float((mean**2).sum() + (0.0 if std is None else (std.astype(np.float64) ** 2).sum()))


def _own_scratch(digest: str) -> Path:
    """A folder for the shards in hand; what killed processes of the same plan left on this machine is removed."""
    base = Path(tempfile.gettempdir())
    # With the host's name, since nodes may share the folder and a process's number means nothing on another one.
    prefix = f"diffussm-prepare-{digest[:16]}-{socket.gethostname()}-"
    for left in base.glob(f"{prefix}*"):
        pid = left.name.removeprefix(prefix).split("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))
