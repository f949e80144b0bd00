"""Pictures to latent shards: the writing door to mosaicml-streaming.

Each sample holds its id and label and the posterior's mean and standard deviation, of the picture and of its mirror
image, scaled, in half precision. Samples lie in a fixed random order, so that any stretch of shards holds all classes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import MDSWriter
from streaming.base.storage import CloudUploader

from diffussm.config.schema import Config, DataConfig, OnCorrupt
from diffussm.data import autoencoder, images, latents
from diffussm.data.autoencoder import Autoencoder
from diffussm.data.images import CorruptImageError, ImageSource, Item, Pixels
from diffussm.data.passport import CROP, DTYPE, FILE, Passport, Skipped
from diffussm.errors import DataError, StorageError
from diffussm.naming import is_remote

BATCH = 64
"""Pictures in one pass of the autoencoder."""
HASHES = ["sha1", "xxh64"]
"""Digests of each shard in the index; sorted, as streaming wants them. Readers check the second."""
Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""

_UPLOAD_RETRIES = 5
_logger = logging.getLogger(__name__)


def prepare(cfg: Config, *, progress: Progress | None = None, device: str = "") -> Passport:
    """Make the latents that `cfg` asks for, unless they are there already.

    Args:
        cfg: a checked config; only its data section is used.
        progress: called after each batch.
        device: where the autoencoder runs; empty takes the GPU if there is one.

    Returns:
        The passport of the latents; its `skipped` names the pictures that could not be decoded.

    Raises:
        DataError: the place holds other latents or other files, or the source is at fault (see `images.open_source`).
        CorruptImageError: a picture cannot be decoded and `data.on_corrupt` is fail.
        StorageError: the place cannot be written.

    The passport is written last. A local folder appears whole or not at all; in a bucket, shards of a stopped attempt
    are overwritten by the next.
    """
    data = cfg.data
    place = latents.local_path(data.latents)
    digest = autoencoder.digest(data.autoencoder)
    made = _existing(place)
    if made is not None:
        made.check(data, digest)
        return made
    source = images.open_source(data)
    network = autoencoder.load(data.autoencoder).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if data.resolution_px % network.downsampling:
        raise DataError(
            f"data.resolution_px: found {data.resolution_px}; {data.autoencoder} takes multiples of "
            f"{network.downsampling}",
            f"set data.resolution_px to a multiple of {network.downsampling}",
        )
    if is_remote(place):
        return _prepare_remote(data, source, network, place, progress)
    return _prepare_local(data, source, network, Path(place), digest, progress)


@dataclass
class _Tally:
    """What is counted while samples are written."""

    class_counts: list[int]
    skipped: list[Skipped] = field(default_factory=list)
    elements: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, label: int, mean: Any, std: Any) -> None:
        """Count one sample; the square of a posterior sample is mean^2 + std^2 on average."""
        mean, std = mean.astype(np.float64), std.astype(np.float64)
        self.class_counts[label] += 1
        self.elements += mean.size
        self.total += float(mean.sum())
        self.squares += float((mean**2 + std**2).sum())

    def passport(self, data: DataConfig, source: ImageSource, network: Autoencoder, index_digest: str) -> Passport:
        """The passport of what was written."""
        mean = self.total / self.elements
        side = data.resolution_px // network.downsampling
        return Passport(
            source=data.source.value,
            wanted_classes=tuple(data.classes),
            limit=data.limit,
            resolution_px=data.resolution_px,
            crop=CROP,
            classes=tuple(source.classes),
            class_counts=tuple(self.class_counts),
            number=sum(self.class_counts),
            skipped=tuple(self.skipped),
            credit=source.credit,
            autoencoder=data.autoencoder,
            autoencoder_digest=network.digest,
            downsampling=network.downsampling,
            scaling_factor=network.scaling_factor,
            shift=network.shift,
            dtype=DTYPE,
            latent_shape=(network.channels, side, side),
            latent_mean=mean,
            latent_std=(self.squares / self.elements - mean**2) ** 0.5,
            index_digest=index_digest,
        )


def _existing(place: str) -> Passport | None:
    """The passport at `place`, None if nothing is there; raises DataError for a folder of other things."""
    with tempfile.TemporaryDirectory(prefix="diffussm-prepare-") as scratch:
        path = latents.fetch(place, FILE, Path(scratch))
        if path is not None:
            return Passport.from_json(path.read_bytes(), f"{place}/{FILE}")
    if not is_remote(place) and Path(place).exists() and (not Path(place).is_dir() or any(Path(place).iterdir())):
        raise DataError(
            f"data.latents: found {place}, which holds other things than latents; nothing there is overwritten",
            "choose a folder that does not exist yet",
        )
    return None


def _prepare_local(
    data: DataConfig, source: ImageSource, network: Autoencoder, folder: Path, digest: str, progress: Progress | None
) -> Passport:
    """Write beside `folder`, then rename, while holding a lock that a killed process cannot keep."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock")):
            # Another process may have finished while this one waited for the lock.
            made = _existing(str(folder))
            if made is not None:
                made.check(data, digest)
                return made
            scratch = folder.with_name(f".{folder.name}.writing")
            shutil.rmtree(scratch, ignore_errors=True)
            try:
                tally = _write(data, source, network, str(scratch), progress)
                passport = tally.passport(data, source, network, _digest(scratch / latents.INDEX))
                (scratch / FILE).write_text(passport.to_json(), encoding="utf-8")
                scratch.replace(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            return passport
    except OSError as error:
        raise StorageError(
            f"data.latents: {folder} cannot be written ({error.strerror or error})",
            "choose a folder on a disk that can be written and has room",
        ) from error


def _prepare_remote(
    data: DataConfig, source: ImageSource, network: Autoencoder, url: str, progress: Progress | None
) -> Passport:
    """Upload each shard as it fills, then the index, then the passport."""
    with tempfile.TemporaryDirectory(prefix="diffussm-prepare-") as name:
        scratch = Path(name)
        tally = _write(data, source, network, (str(scratch / "shards"), url), progress)
        index = latents.fetch(url, latents.INDEX, scratch)
        if index is None:
            raise StorageError(f"{url}: the index was written and is not there", "check the store")
        passport = tally.passport(data, source, network, _digest(index))
        with latents.storage_errors(url):
            uploader = CloudUploader.get((str(scratch / "passport"), url), keep_local=True, retry=_UPLOAD_RETRIES)
            (scratch / "passport" / FILE).write_text(passport.to_json(), encoding="utf-8")
            uploader.upload_file(FILE)
        return passport


def _write(
    data: DataConfig,
    source: ImageSource,
    network: Autoencoder,
    out: str | tuple[str, str],
    progress: Progress | None,
) -> _Tally:
    """Encode all pictures of `source` into shards at `out`; raises DataError when a class has no picture left."""
    place = out if isinstance(out, str) else out[1]
    side = data.resolution_px // network.downsampling
    moment = f"ndarray:{DTYPE}:{network.channels},{side},{side}"
    columns = {"id": "int", "label": "int"} | dict.fromkeys(latents.MOMENTS, moment)
    with latents.storage_errors(place):
        writer = MDSWriter(out=out, columns=columns, hashes=HASHES, size_limit=data.shard_bytes, retry=_UPLOAD_RETRIES)
    tally = _Tally([0] * len(source.classes))
    done = 0
    try:
        for items, pixels, skipped in _batches(source, data.on_corrupt):
            tally.skipped += skipped
            done += len(items) + len(skipped)
            if items:
                moments = _moments(network, np.stack(pixels))
                for item, *values in zip(items, *moments, strict=True):
                    tally.add(item.label, values[0], values[1])
                    sample = {"id": item.id, "label": item.label} | dict(zip(latents.MOMENTS, values, strict=True))
                    with latents.storage_errors(place):
                        writer.write(sample)
            if progress is not None:
                progress(done, len(source))
        empty = [name for name, count in zip(source.classes, tally.class_counts, strict=True) if not count]
        if empty:
            raise DataError(
                f"data.source={data.source.value}: no picture of {', '.join(empty)} can be decoded "
                f"({len(tally.skipped)} skipped, for example {tally.skipped[0].name}: {tally.skipped[0].reason})",
                "repair the pictures or leave out the class by data.classes",
            )
    except BaseException:
        # Leaving streaming's own context manager would write an index even now.
        writer.cancel_future_jobs()
        raise
    with latents.storage_errors(place):
        writer.finish()
    return tally


def _batches(source: ImageSource, on_corrupt: OnCorrupt) -> Iterator[tuple[list[Item], list[Pixels], list[Skipped]]]:
    """Decoded pictures in a fixed random order, BATCH at a time, with those that were skipped."""
    order = np.random.default_rng(0).permutation(len(source))
    items = list(source)

    def load(position: int) -> tuple[Item, Pixels | CorruptImageError]:
        try:
            return items[position], source.load(items[position])
        except CorruptImageError as error:
            return items[position], error

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(order), BATCH):
            kept, pixels, skipped = [], [], []
            for item, result in pool.map(load, order[start : start + BATCH]):
                if not isinstance(result, CorruptImageError):
                    kept.append(item)
                    pixels.append(result)
                elif on_corrupt is OnCorrupt.fail:
                    raise result
                else:
                    _logger.warning("skipped: %s", result.message)
                    skipped.append(Skipped(item.name, result.message))
            yield kept, pixels, skipped


def _moments(network: Autoencoder, pictures: Pixels) -> list[Any]:
    """Mean and standard deviation of pictures (B, H, W, 3), then of their mirror images: four (B, C, h, w) arrays."""
    pairs = (network.encode(pictures), network.encode(np.ascontiguousarray(pictures[:, :, ::-1])))
    return [moment.cpu().numpy().astype(DTYPE) for moment in itertools.chain(*pairs)]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # Released by the kernel when the process ends, however it ends.
        yield
