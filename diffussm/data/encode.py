"""Make the latents that a config asks for: plan, units, then index and passport. Here in one process, without Ray."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffussm.checkpoint.store import NotFound, Store, open_store
from diffussm.config.schema import Config
from diffussm.data import autoencoder, images, latents, shards
from diffussm.data.encoder import UNITS_AT_ONCE, Encoder, Job, Progress, columns
from diffussm.data.ledger import Ledger, Record, summed
from diffussm.data.passport import CROP, DTYPE, FILE, Passport
from diffussm.data.source import ImageSource
from diffussm.data.units import Unit, batch_size, plan
from diffussm.errors import DataError
from diffussm.naming import absolute, is_remote, join

_ABANDONED_S = 600.0
"""A half-written local file as old as this belongs to nobody who still lives."""
_logger = logging.getLogger(__name__)


@dataclass
class Work:
    """Latents that are being made."""

    job: Job
    source: ImageSource
    ledger: Ledger
    records: dict[int, Record]
    """Units that are done."""

    @property
    def todo(self) -> list[Unit]:
        """Units that are not."""
        return [unit for unit in self.ledger.plan.units if unit.number not in self.records]

    @property
    def done_images(self) -> int:
        """Pictures of the units that are done."""
        return sum(len(unit.items) for unit in self.ledger.plan.units if unit.number in self.records)


Run = Callable[[Work, Progress], None]
"""Does all units of `todo` and puts their records into `records`."""


def prepare(cfg: Config, *, progress: Progress | None = None, device: str = "", run: Run | None = None) -> Passport:
    """Make the latents that `cfg` asks for, unless they are there already.

    Args:
        cfg: a checked config; only its sections data and prepare are used.
        progress: called when the first encoder is ready, so that a rate does not count its start, and as pictures are
            done.
        device: where the autoencoder runs; empty takes the GPU if there is one.
        run: does the units; empty does them in this process.

    Returns:
        The passport of the latents; its `skipped` names the pictures that could not be decoded.

    Raises:
        DataError: the place holds other latents or other files, the source is at fault (see `images.open_source`), or a
            class has no picture that can be decoded.
        CorruptImageError: a picture cannot be decoded and `data.on_corrupt` is fail.
        StorageError: the place cannot be written.

    The passport is written last; without it there are no latents. Whatever ends the work before, the same command goes
    on with the units that are not done, and gives the same bytes.
    """
    made = existing(cfg)
    if made is not None:
        return made
    work = begin(cfg, device)
    if work.todo:
        (run or run_here)(work, progress or (lambda done, total: None))
    return finish(work)


def existing(cfg: Config) -> Passport | None:
    """The passport of the finished latents at `data.latents`, None if there are none; raises DataError for others."""
    place = latents.local_path(cfg.data.latents)
    try:
        text = open_store(place).read(FILE)
    except NotFound:
        return None
    made = Passport.from_json(text, join(place, FILE))
    made.check(cfg.data, autoencoder.digest(cfg.data.autoencoder))
    if absolute(made.images) != absolute(cfg.data.images):  # they may have moved, so it is no error
        _logger.warning(
            "data.images: the latents at %s were made of %s, the config names %s; they are used as they are. "
            "Set data.latents to another place if these are other pictures",
            place, made.images or "no folder", cfg.data.images or "no folder",
        )  # fmt: skip
    return made


def begin(cfg: Config, device: str = "") -> Work:
    """Plan the units and claim the place; raises as `prepare`."""
    data = cfg.data
    place = latents.local_path(data.latents)
    step = autoencoder.describe(data.autoencoder).downsampling
    if data.resolution_px % step:
        raise DataError(
            f"data.resolution_px: found {data.resolution_px}; {data.autoencoder} takes multiples of {step}",
            f"set data.resolution_px to a multiple of {step}",
        )
    source = images.open_source(data)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch = batch_size(cfg.prepare.batch, data.resolution_px, len(source))
    settings = {
        "data.source": data.source.value,
        "data.classes": list(data.classes),
        "data.limit": data.limit,
        "data.resolution_px": data.resolution_px,
        "data.autoencoder": autoencoder.digest(data.autoencoder),
        "data.encoder_precision": data.encoder_precision.value,
        "data.stored": data.stored.value,
        "data.shard_bytes": data.shard_bytes,
        "prepare.unit_images": cfg.prepare.unit_images,
        "prepare.batch": batch,
        "prepare.threads_per_worker": cfg.prepare.threads_per_worker,
        "crop": CROP,
        "device": device.split(":")[0],
    }
    whole = plan(source, settings, cfg.prepare.unit_images)
    ledger = Ledger(open_store(place), whole)
    ledger.begin()
    job = Job(cfg, place, replace(whole, units=()), source.reader, batch, device)
    return Work(job, source, ledger, ledger.done(_logger.warning))


def run_here(work: Work, progress: Progress) -> None:
    """Do all units in this process: one is decoded or stored while another is encoded."""
    done, total = work.done_images, work.ledger.plan.images
    lock = threading.Lock()

    def count(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            progress(done, total)

    encoder = Encoder(work.job)
    progress(done, total)
    try:
        with ThreadPoolExecutor(UNITS_AT_ONCE) as pool:
            futures = [pool.submit(encoder.run, unit, count) for unit in work.todo]
            try:
                for future in futures:
                    record = future.result()
                    work.records[record.unit] = record
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
    finally:
        encoder.close()


def finish(work: Work) -> Passport:
    """Write index and passport from the ledger; raises DataError when a class has no picture left."""
    records = [work.records[unit.number] for unit in work.ledger.plan.units]
    counts, converted, skipped, mean, std = summed(records, len(work.source.classes))
    empty = [name for name, count in zip(work.source.classes, counts, strict=True) if not count]
    data = work.job.cfg.data
    if empty:
        work.ledger.take_back(record for record in records if record.skipped)
        raise DataError(
            f"data.source={data.source.value}: no picture of {', '.join(empty)} can be decoded "
            f"({len(skipped)} skipped, for example {skipped[0].name}: {skipped[0].reason})",
            "repair the pictures or leave out the class by data.classes",
        )
    store = work.ledger.store
    work.ledger.sweep(records)
    index = shards.index_json([shard for record in records for shard in record.shards])
    store.write(latents.INDEX, index)
    network = autoencoder.describe(data.autoencoder)
    side = data.resolution_px // network.downsampling
    passport = Passport(
        source=data.source.value,
        wanted_classes=tuple(data.classes),
        limit=data.limit,
        resolution_px=data.resolution_px,
        crop=CROP,
        classes=tuple(work.source.classes),
        class_counts=tuple(counts),
        number=sum(counts),
        skipped=tuple(skipped),
        credit=work.source.credit,
        autoencoder=data.autoencoder,
        autoencoder_digest=network.digest,
        downsampling=network.downsampling,
        scaling_factor=network.scaling_factor,
        shift=network.shift,
        dtype=DTYPE,
        latent_shape=(network.channels, side, side),
        latent_mean=mean,
        latent_std=std,
        index_digest=hashlib.sha256(index).hexdigest(),
        images=data.images,
        labels=data.labels,
        encoder_precision=data.encoder_precision.value,
        stored=data.stored.value,
        columns=columns(data.stored, network.deterministic),
        latents_mean=network.latents_mean,
        latents_std=network.latents_std,
        converted=dict(sorted(converted.items())),
        plan_digest=work.ledger.plan.digest,
    )
    store.write(FILE, passport.to_json().encode())
    _sweep_halves(store, work.job.place)
    return passport


def _sweep_halves(store: Store, place: str) -> None:
    """Remove files that killed workers left half-written in a local folder; in a bucket there are none."""
    if is_remote(place):
        return
    for path in Path(place).rglob("*.part"):
        if time.time() - path.stat().st_mtime > _ABANDONED_S:
            path.unlink(missing_ok=True)
