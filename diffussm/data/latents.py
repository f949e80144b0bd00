"""Latents as batches: what a training reads, on every rank, from any point on.

The order of samples depends on (seed, epoch) alone. Each global batch holds the same samples for every legal number of
ranks (`config.plan`), and reading may begin at any global batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import torch.distributed as dist
from torch.utils.data import DataLoader

from diffussm.config import plan
from diffussm.config.schema import Config
from diffussm.config.sets import each_set
from diffussm.data import autoencoder
from diffussm.data.cache import Reading, limit_bytes
from diffussm.data.cursor import Batch, Cursor
from diffussm.data.mixture import ID_STRIDE, Mixture
from diffussm.data.passport import Passport
from diffussm.data.place import INDEX, MOMENTS, fetch, local_path, passport, storage_errors
from diffussm.data.ranks import Ranks, by_leader, check_disjoint, current, everyone
from diffussm.data.reader import LatentDataset, LatentStream, own_names
from diffussm.errors import ConfigError, DataError
from diffussm.naming import is_remote

__all__ = ["INDEX", "MOMENTS", "Latents", "fetch", "local_path", "open_latents", "passport", "storage_errors"]

_INDEX_TIMEOUT_S = 60.0
_FIRST_PREFIX = 1_000_000
"""Below it are the shared-memory prefixes that streaming would count up itself."""


class Latents:
    """The latents of one run on one rank.

    Attributes:
        passport: what the latents of the main set are.
        latent: their shape and the number of classes.
        number: samples of the data set; of several sets, those that belong to a whole global batch of their set.
        mixture: the sets, and their turns.
        epoch_images: images of one epoch, the last incomplete global batch of each set left out.
        null_class: label that stands for "no class".
    """

    def __init__(self, sets: list[tuple[LatentDataset, Passport]], cfg: Config) -> None:
        self.passport = sets[0][1]
        self.mixture = Mixture(tuple(made.number for _, made in sets), cfg.train.global_batch, cfg.seed)
        self.epoch_images = self.mixture.epoch_images
        self.number = self.passport.number if len(sets) == 1 else self.epoch_images
        self.null_class = len(self.passport.classes)
        self.latent = self.passport.latent
        self._readers = [reader for reader, _ in sets]
        self._cfg = cfg

    def batches(self, cursor: Cursor) -> Generator[tuple[int, Batch], None, None]:
        """Endless (epoch, this rank's part of a global batch), from `cursor` on. Every rank must iterate.

        Raises:
            DataError: the cursor does not fit the data, a shard is missing or corrupt, or samples are missing or
                doubled.
            StorageError: a shard did not come within `data.store_deadline_s`.
        """
        batch_images = self._cfg.train.global_batch
        at = cursor.normalised(self.number, batch_images)
        checked = set[int]()
        while True:
            turns = self.mixture.schedule(at.epoch)
            done = at.images_in_epoch // batch_images
            epochs = [
                self._epoch(reader, at.epoch, turns[:done].count(turn) * batch_images)
                for turn, reader in enumerate(self._readers)
            ]
            try:
                for read, turn in enumerate(turns[done:], start=done):
                    batch = next(epochs[turn], None)
                    if batch is None:
                        raise DataError(
                            f"data.latents: epoch {at.epoch} ended after {read} of {len(turns)} batches",
                            "check that all shards are there; make the latents again with `diffussm prepare`",
                        )
                    if turn not in checked:
                        check_disjoint(batch)
                        checked.add(turn)
                    yield at.epoch, batch
            finally:
                for epoch in epochs:
                    epoch.close()
            at = Cursor(at.epoch + 1)

    def close(self) -> None:
        """End the background threads. Collective: every rank must call it.

        It waits for all ranks, because those of a node read under locks in the first one's scratch folder, which may be
        removed afterwards.
        """
        for reader in self._readers:
            reader.stop()
        if dist.is_initialized():
            dist.barrier()

    def _epoch(self, reader: LatentDataset, epoch: int, images: int) -> Generator[Batch, None, None]:
        """Batches of one set in one epoch, in this process or by `data.loader_workers`."""
        reader.begin(epoch, images)
        workers = self._cfg.data.loader_workers
        if workers == 0:
            yield from reader
            return
        yield from DataLoader(reader, batch_size=None, num_workers=workers, collate_fn=_as_it_is)  # type: ignore[arg-type]


def open_latents(cfg: Config, *, rank_batch: int, scratch: Path) -> Latents:
    """Open the latents that `cfg` names, on every rank. Collective: every rank must call it.

    Args:
        cfg: a checked config.
        rank_batch: samples of each global batch on this rank, `train.global_batch` over the number of ranks.
        scratch: local folder for locks and, when the latents are remote and `data.cache` is empty, for the shards.
            Of the ranks on one node the first one's folder is used by all.

    Raises:
        DataError: no latents there, or made with other settings than `cfg` asks for.
        StorageError: the store cannot be reached.
        ConfigError: the cluster's size would change the order of samples, or the cache is too small.
        MissingError: the environment does not say which rank this is, or contradicts the process group.
    """
    ranks = current()
    if rank_batch * ranks.size != cfg.train.global_batch:
        raise DataError(
            f"train.global_batch: found {cfg.train.global_batch}; {ranks.size} ranks with {rank_batch} images each "
            f"make {rank_batch * ranks.size}",
            "choose a train.global_batch that the number of workers divides",
        )
    refused = plan.why_illegal(
        plan.Batching(cfg.train.global_batch, 0, cfg.data.canonical_nodes), ranks.nodes, ranks.per_node
    )
    if refused is not None:
        raise ConfigError(*refused)
    sets = [_open(one, ranks, rank_batch, scratch, position) for position, one in enumerate(each_set(cfg))]
    first = sets[0][1]
    for _, made in sets[1:]:
        if (made.classes, made.latent.channels) != (first.classes, first.latent.channels):
            raise DataError(
                f"data.more: the {made.resolution_px} px latents have {len(made.classes)} classes and "
                f"{made.latent.channels} channels, the {first.resolution_px} px ones {len(first.classes)} and "
                f"{first.latent.channels}; allowed: the same classes and channels",
                "make all sets from the same images with the same autoencoder",
            )
    return Latents(sets, cfg)


def _open(cfg: Config, ranks: Ranks, rank_batch: int, scratch: Path, position: int) -> tuple[LatentDataset, Passport]:
    """One set of latents, the `position`-th of the run. Collective."""
    data, place = cfg.data, local_path(cfg.data.latents)
    made = passport(place)
    made.check(data, autoencoder.digest(data.autoencoder))
    if made.number < 2 * ranks.nodes:  # below it, streaming cannot pad the nodes' shares
        raise DataError(f"data.latents: {made.number} images are too few for {ranks.nodes} nodes", "use fewer nodes")
    # Names must be new in each start of the worker group: what killed processes left behind is then never met.
    names = everyone((_FIRST_PREFIX + secrets.randbelow(1 << 31), str(scratch)))
    prefix, folder = names[ranks.leader]  # each node its own: several may share one /dev/shm, as on one host
    ahead = _images_ahead(cfg, ranks, rank_batch)
    if is_remote(place):
        # One cache folder holds shards of one index only, so that shards of other latents are never taken for these.
        cache = Path(data.cache or folder) / f"latents-{made.index_digest[:16]}"
        limit = by_leader(ranks, lambda: _set_up(cache, place, made, cfg, ranks, ahead * ranks.per_node))
    else:
        cache, limit = Path(place), None  # never evict the only copy
    if not _is_index(cache / INDEX, made):
        raise _mismatch(place)
    with own_names(prefix, folder), storage_errors(place):
        reader = LatentDataset(
            stream=LatentStream(remote=place if is_remote(place) else None, local=str(cache)),
            rank_batch=rank_batch,
            canonical_nodes=data.canonical_nodes,
            deadline_s=data.store_deadline_s,
            rank=ranks.rank,
            id_offset=position * ID_STRIDE,
            # Streaming seeds a 32-bit generator with seed + epoch.
            shuffle_seed=cfg.seed % (1 << 31),
            shuffle_block_size=data.shuffle_block_images,
            predownload=ahead,
            cache_limit=limit,
        )
    if reader.num_samples != made.number:
        raise _mismatch(place)
    return reader, made


def _images_ahead(cfg: Config, ranks: Ranks, rank_batch: int) -> int:
    """Samples of each rank whose shards are fetched ahead: a shuffle block, since each brings new shards at once."""
    usual = max(8 * rank_batch, 64, -(-cfg.data.shuffle_block_images * cfg.data.canonical_nodes // ranks.size))
    return max(cfg.data.predownload_images or usual, rank_batch)


def _set_up(cache: Path, place: str, made: Passport, cfg: Config, ranks: Ranks, window: int) -> int | None:
    """Bring the index into a node's cache folder; returns the limit of the cache in bytes, None for none.

    Raises:
        StorageError: the store or the folder fails.
        ConfigError: the cache is smaller than what is in use at once.
    """
    with storage_errors(str(cache)):
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob("*.part"):
            if not _lives(left.name.split(".")[-2]):
                left.unlink(missing_ok=True)
        for folder in cache.glob("arriving-*"):
            if not _lives(folder.name.split("-")[1]):
                shutil.rmtree(folder, ignore_errors=True)  # another rank may be faster
        held = sum(file.stat().st_size for file in cache.glob("*.mds"))
        free = shutil.disk_usage(cache).free + held
    index = cache / INDEX
    if not _is_index(index, made):  # not there yet, or damaged
        # A folder of its own: other jobs of this node may share the cache.
        with (
            storage_errors(str(cache)),
            tempfile.TemporaryDirectory(prefix=f"arriving-{os.getpid()}-", dir=cache) as beside,
        ):
            fetched = fetch(place, INDEX, Path(beside))
            if fetched is None:
                raise _mismatch(place)
            fetched.replace(index)
    try:
        shards = json.loads(index.read_bytes())["shards"]
        samples, sizes = zip(*((shard["samples"], shard["raw_data"]["bytes"]) for shard in shards), strict=True)
    except (ValueError, KeyError, TypeError) as error:
        raise _mismatch(place) from error
    readers = ranks.per_node * max(1, cfg.data.loader_workers)
    reading = Reading(
        samples, sizes, index.stat().st_size, max(1, cfg.data.canonical_nodes // ranks.nodes),
        cfg.data.shuffle_block_images, window * max(1, cfg.data.loader_workers), readers,
    )  # fmt: skip
    return limit_bytes(reading, cfg.data.cache_limit_bytes, free)


def _lives(pid: str) -> bool:
    """Whether the process that left something in the cache is still there, or was killed."""
    return Path("/proc", pid).exists()


def _is_index(path: Path, made: Passport) -> bool:
    """Whether a file is the index that the passport means."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == made.index_digest


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _mismatch(place: str) -> DataError:
    return DataError(
        f"data.latents: passport and shards at {place} do not belong together",
        "remove the latents and make them again with `diffussm prepare`",
    )
