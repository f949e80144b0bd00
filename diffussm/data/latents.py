"""Latent shards as batches: the reading door to mosaicml-streaming.

The order of samples depends on (seed, epoch) alone. Each global batch holds the same samples for every number of
ranks, and reading may begin at any global batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import secrets
import tempfile
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import streaming.base.dataset
import streaming.base.shared.prefix
import torch
import torch.distributed as dist
from streaming import StreamingDataset
from streaming.base.storage import CloudDownloader
from torch.utils.data import DataLoader

from diffussm.config.schema import Config
from diffussm.data import autoencoder
from diffussm.data.cursor import Batch, Cursor, epoch_images
from diffussm.data.passport import FILE, Passport
from diffussm.errors import DataError, DiffuSSMError, MissingError, StorageError
from diffussm.naming import is_remote, join

INDEX = "index.json"
MOMENTS = ("mean", "std", "mean_flip", "std_flip")
_DOWNLOAD_TIMEOUT_S = 60.0
_FIRST_PREFIX = 1_000_000
"""Below it are the shared-memory prefixes that streaming would count up itself."""


class LatentDataset(StreamingDataset):
    """Streaming's data set, except that a failed download is an error.

    Streaming logs a failure of its background threads and ends the epoch, as if there were no more data.
    """

    _failure: BaseException | None = None

    def on_exception(self, future: Future[Any]) -> None:
        """Keep the exception of a background thread for `__iter__`, and let the other threads end."""
        failure = future.exception()
        if failure is not None:
            self._failure = failure
            self._event.set()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """This rank's samples of the next epoch; raises DataError when a shard cannot be had or is corrupt."""
        try:
            yield from super().__iter__()
        except (RuntimeError, OSError, ValueError) as error:
            # Streaming's own report that a thread failed, or the read of the broken shard itself.
            raise self._explain(self._failure or error) from error
        if self._event.is_set():
            raise self._explain(self._failure) from self._failure

    def stop(self) -> None:
        """End the background threads of an epoch that is left early.

        Streaming's own `exit` counts the threads that end well, and would wait for ever for one that failed.
        """
        if hasattr(self, "_iterator"):
            self._iterator.non_blocking_exit()
            self._executor.shutdown(wait=True)
            del self._iterator, self._executor

    def _explain(self, failure: BaseException | None) -> DataError:
        stream = self.streams[0]
        return DataError(
            f"data.latents: a shard of {stream.remote or stream.local} cannot be read ({failure})",
            "check the store and the network; if a checksum failed, make the latents again with `diffussm prepare`",
        )


class Latents:
    """The latents of one run on one rank.

    Attributes:
        passport: what the latents are.
        latent: their shape and the number of classes.
        number: samples in the data set.
        epoch_images: images of one epoch, the last incomplete global batch left out.
        null_class: label that stands for "no class".
    """

    def __init__(self, dataset: LatentDataset, passport: Passport, cfg: Config) -> None:
        self.passport = passport
        self.number = passport.number
        self.epoch_images = epoch_images(passport.number, cfg.train.global_batch)
        self.null_class = len(passport.classes)
        self._dataset = dataset
        self._cfg = cfg
        self.latent = passport.latent

    def batches(self, cursor: Cursor) -> Generator[tuple[int, Batch], None, None]:
        """Endless (epoch, this rank's part of a global batch), from `cursor` on. Every rank must iterate.

        Raises:
            DataError: the cursor does not fit the data, a shard cannot be read, or samples are missing or doubled.
        """
        cfg, dataset = self._cfg, self._dataset
        at = cursor.normalised(self.number, cfg.train.global_batch)
        first = True
        while True:
            # Streaming ignores a state that lies before the epoch it expects next.
            dataset.next_epoch = at.epoch
            dataset.load_state_dict(
                {
                    "epoch": at.epoch,
                    "sample_in_epoch": at.images_in_epoch,
                    "num_canonical_nodes": cfg.data.canonical_nodes,
                    "shuffle_seed": dataset.shuffle_seed,
                    # What decides whether canonical nodes are folded; fixed, since the cluster may change.
                    "initial_physical_nodes": cfg.data.canonical_nodes,
                }
            )
            expected = (self.epoch_images - at.images_in_epoch) // cfg.train.global_batch
            loader = DataLoader(
                dataset, batch_size=dataset.batch_size, num_workers=cfg.data.loader_workers, collate_fn=collate
            )
            read = 0
            try:
                for batch in itertools.islice(loader, expected):
                    if first:
                        _check_disjoint(batch)
                        first = False
                    read += 1
                    yield at.epoch, batch
            finally:
                dataset.stop()
            if read != expected:
                raise DataError(
                    f"data.latents: epoch {at.epoch} ended after {read} of {expected} batches",
                    "check that all shards are there; make the latents again with `diffussm prepare`",
                )
            at = Cursor(at.epoch + 1)

    def close(self) -> None:
        """End the background threads. Collective: every rank must call it.

        It waits for all ranks, because those of a node read under locks in the first one's scratch folder, which may be
        removed afterwards.
        """
        self._dataset.stop()
        if dist.is_initialized():
            dist.barrier()


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
        MissingError: the environment does not say which rank this is, or contradicts the process group.
    """
    place = local_path(cfg.data.latents)
    read = passport(place)
    read.check(cfg.data, autoencoder.digest(cfg.data.autoencoder))
    size, leader = check_world()
    if rank_batch * size != cfg.train.global_batch:
        raise DataError(
            f"train.global_batch: found {cfg.train.global_batch}; {size} ranks with {rank_batch} images each "
            f"make {rank_batch * size}",
            "choose a train.global_batch that the number of workers divides",
        )
    if not is_remote(place) and not (Path(place) / INDEX).is_file():
        raise _mismatch(place)
    # Names must be new in each start of the worker group: what killed processes left behind is then never met.
    prefix, folder = _agree((_FIRST_PREFIX + secrets.randbelow(1 << 31), str(scratch)), leader)
    # One cache folder holds shards of one index only, so that shards of other latents are never taken for these.
    cache = Path(cfg.data.cache or folder) / f"latents-{read.index_digest[:16]}"
    with _own_names(prefix, folder), storage_errors(place):
        dataset = LatentDataset(
            remote=place if is_remote(place) else None,
            local=str(cache) if is_remote(place) else place,
            batch_size=rank_batch,
            shuffle=True,
            shuffle_algo="py1br",
            # Streaming seeds a 32-bit generator with seed + epoch.
            shuffle_seed=cfg.seed % (1 << 31),
            shuffle_block_size=cfg.data.shuffle_block_images,
            num_canonical_nodes=cfg.data.canonical_nodes,
            # Attempts, with pauses that double from 1 s. A file missing from a local folder will not appear.
            download_retry=cfg.data.download_retries + 1 if is_remote(place) else 1,
            download_timeout=_DOWNLOAD_TIMEOUT_S,
            validate_hash="xxh64",
            predownload=max(8 * rank_batch, 64),
        )
    found = hashlib.sha256(((cache if is_remote(place) else Path(place)) / INDEX).read_bytes()).hexdigest()
    if found != read.index_digest or dataset.num_samples != read.number:
        raise _mismatch(place)
    return Latents(dataset, read, cfg)


def passport(url: str) -> Passport:
    """Read the passport of the latents at a folder or bucket URL.

    Raises:
        DataError: there is none, or it is malformed.
        StorageError: the store cannot be reached.
    """
    place = local_path(url)
    with tempfile.TemporaryDirectory(prefix="diffussm-passport-") as folder:
        path = fetch(place, FILE, Path(folder))
        if path is None:
            raise DataError(
                f"data.latents: found no {FILE} at {url}; the latents were not made, or not to the end",
                "run `diffussm prepare` with this config",
            )
        return Passport.from_json(path.read_bytes(), join(url, FILE))


def fetch(place: str, name: str, folder: Path) -> Path | None:
    """A local path of one file of the latents, copied to `folder` if they are remote; None if there is no such file.

    Raises:
        StorageError: the store cannot be reached, or the file not read.
    """
    if not is_remote(place):
        path = Path(place) / name
        return path if path.is_file() else None
    target = folder / name
    try:
        CloudDownloader.get(place).download(join(place, name), str(target), _DOWNLOAD_TIMEOUT_S)
    except FileNotFoundError:
        return None
    except Exception as error:
        code = getattr(error, "response", {}).get("Error", {}).get("Code")
        if code in ("404", "NoSuchKey"):
            return None
        raise _storage_error(join(place, name), error) from error
    return target


def local_path(url: str) -> str:
    """`url` without a file:// scheme, home folder expanded; bucket URLs as they are, without a trailing slash."""
    return url.rstrip("/") if is_remote(url) else str(Path(url.removeprefix("file://")).expanduser())


@contextlib.contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Turn what streaming raises about a store, which is any exception, into a StorageError that names `place`."""
    try:
        yield
    except DiffuSSMError:
        raise
    except Exception as error:
        raise _storage_error(place, error) from error


def check_world() -> tuple[int, int]:
    """Number of ranks, and the first rank on this one's node, from the environment that streaming reads too.

    Raises:
        MissingError: a variable is missing or contradicts the process group. Streaming would take this process for
            rank 0 of 1, and every rank would train on the same samples.
    """
    group = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [os.environ.get(name) for name in names]
    if values == [None] * 4 and group == (0, 1):
        return 1, 0
    if None in values:
        raise MissingError(
            f"environment: {', '.join(n for n, v in zip(names, values, strict=True) if v is None)} not set",
            "start the workers by Ray Train or torchrun, which set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE",
        )
    rank, size, local_rank, local_size = (int(value) for value in values if value is not None)
    if (rank, size) != group or size % local_size or rank % local_size != local_rank:
        raise MissingError(
            f"environment: found rank {rank} of {size}, {local_rank} of {local_size} on its node, "
            f"and a process group with rank {group[0]} of {group[1]}; each node needs equally many ranks in order",
            "give each node the same number of workers",
        )
    return size, rank - local_rank


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Samples of the shards as one batch of writable tensors, moments as fp32."""
    moments = (
        torch.from_numpy(np.stack([sample[name] for sample in samples]).astype(np.float32))  # (B, C, H, W)
        for name in MOMENTS
    )
    ids = torch.tensor([sample["id"] for sample in samples], dtype=torch.int64)  # (B,)
    labels = torch.tensor([sample["label"] for sample in samples], dtype=torch.int64)  # (B,)
    return Batch(ids, labels, *moments)


def _agree(mine: tuple[int, str], leader: int) -> tuple[int, str]:
    """Rank 0's prefix with the folder of this node's first rank. Collective."""
    if not dist.is_initialized():
        return mine
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone[0][0], everyone[leader][1]


def _check_disjoint(batch: Batch) -> None:
    """Raise DataError when two ranks read the same samples. Collective."""
    if not dist.is_initialized():
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, batch.id.tolist())
    ids = list(itertools.chain(*everyone))
    if len(set(ids)) != len(ids):
        raise DataError(f"data.latents: {len(ids) - len(set(ids))} of {len(ids)} samples of a batch are doubled")


@contextlib.contextmanager
def _own_names(prefix: int, folder: str) -> Iterator[None]:
    """Have streaming build its shared memory under `prefix` and its locks in `folder`, for one construction.

    It offers no option for either: it counts prefixes up from 0, which two jobs on a machine do at the same time, and
    puts locks into the machine's temp folder, where they stay.
    """
    prefixes, data = streaming.base.shared.prefix, streaming.base.dataset
    saved = (prefixes._each_prefix_int, prefixes.gettempdir, data.gettempdir)
    prefixes._each_prefix_int = lambda: itertools.count(prefix)
    prefixes.gettempdir = data.gettempdir = lambda: folder
    try:
        yield
    finally:
        prefixes._each_prefix_int, prefixes.gettempdir, data.gettempdir = saved


def _mismatch(place: str) -> DataError:
    return DataError(
        f"data.latents: passport and shards at {place} do not belong together",
        "remove the latents and make them again with `diffussm prepare`",
    )


def _storage_error(place: str, error: Exception) -> StorageError:
    return StorageError(
        f"{place}: cannot be read or written ({type(error).__name__}: {error})",
        "check that the bucket exists, its credentials, S3_ENDPOINT_URL and the network",
    )
