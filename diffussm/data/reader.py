"""One set of latents on one rank: streaming's index, order, cache and downloads; batches and failures are ours.

What is taken from StreamingDataset: the index, the partition and shuffle (`generate_work`), the states of shards that
the ranks of a node share, download by one of them, and eviction. What is not, and why:

* its iteration, which ends an epoch early when a background thread fails, and waits for ever in barriers;
* its named shared memory, of which a killed job leaves parts: the order is computed on each rank, and the names of the
  few arrays are removed as soon as every rank of the node has them open;
* its download with a fixed number of attempts: ours tries again for as long as a step may wait.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffussm.data.cursor import Batch
from diffussm.data.mds import MDSReader, Stream, StreamingDataset, dataset_module, generate_work, prefix_module
from diffussm.data.place import is_absent, is_refused, storage_error
from diffussm.data.records import Records, batch_of, open_records, verify
from diffussm.errors import DataError, DiffuSSMError, StorageError
from diffussm.naming import join

_READ_TIMEOUT_S = 20.0
"""Seconds without a byte after which a request is given up and made again."""
_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 4.0
_POLL_S = 0.002
_REMOTE, _LOCAL = 1, 3
"""States of a shard in streaming's `_ShardState`; 2 is being fetched."""


class LatentStream(Stream):
    """A stream whose downloads are verified before others see them, and tried again until they succeed or are stopped.

    Attributes:
        stopping: set when nobody wants the shards any more.
        trouble: what the latest attempt of a download met; None while the store answers.
    """

    stopping: threading.Event | None = None
    trouble: str | None = None

    def _prepare_shard_part(self, raw_info: Any, zip_info: Any = None, compression: str | None = None) -> int:
        """Fetch one shard to its place in the cache; returns the bytes it added.

        Raises:
            DataError: it is not there, or its digest is wrong twice.
            StorageError: the store refuses it, or `stopping` was set before it came.
        """
        target = Path(self.local) / raw_info.basename
        if target.is_file():
            return 0
        if self.remote is None:
            raise _absent(raw_info.basename, self.local)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        for attempt in (1, 2):
            self._fetch(join(self.remote, raw_info.basename), part)
            try:
                verify(self._shards[raw_info.basename], part)
                break
            except DataError:
                part.unlink()
                if attempt == 2:  # once may have been the network
                    raise
        part.replace(target)
        return int(raw_info.bytes)

    def get_shards(self, *args: Any) -> list[Any]:
        """As streaming's; remembers them by name."""
        shards: list[Any] = super().get_shards(*args)
        self._shards: dict[str, MDSReader] = {shard.raw_data.basename: shard for shard in shards}
        return shards

    def _fetch(self, remote: str, local: Path) -> None:
        pause = _PAUSE_S
        while True:
            local.unlink(missing_ok=True)
            try:
                self._downloader.download(remote, str(local), _READ_TIMEOUT_S)
                self.trouble = None
                return
            except Exception as error:
                self._downloader.clean_up()
                if is_absent(error):
                    raise _absent(remote.rsplit("/", 1)[-1], remote) from error
                if is_refused(error):
                    raise storage_error(remote, error) from error
                self.trouble = f"{type(error).__name__}: {error}"
                if self.stopping is None or self.stopping.wait(pause):
                    raise storage_error(remote, error) from error
                pause = min(2 * pause, _LONGEST_PAUSE_S)


class LatentDataset(StreamingDataset):
    """This rank's batches of one epoch, from any global batch on; see the module's docstring.

    Args:
        rank_batch: samples of a batch.
        canonical_nodes: as in the config; streaming keeps the order for any cluster by it.
        deadline_s: seconds that a batch may wait for a shard.
        rank: of this process, for messages.
        id_offset: added to each sample's id.
        options: of StreamingDataset.
    """

    def __init__(
        self,
        *,
        stream: LatentStream,
        rank_batch: int,
        canonical_nodes: int,
        deadline_s: float,
        rank: int,
        id_offset: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(
            streams=[stream], batch_size=rank_batch, num_canonical_nodes=canonical_nodes, shuffle=True,
            shuffle_algo="py1br", **options,
        )  # fmt: skip
        self.deadline_s, self.rank, self.id_offset = deadline_s, rank, id_offset
        # What decides whether canonical nodes are folded; fixed, since the cluster may change.
        self.initial_physical_nodes = canonical_nodes  # type: ignore[assignment]
        self._start = (0, 0)
        self._fetcher: _Fetcher | None = None
        self._open = dict[int, Records]()
        self._forget_names()

    def begin(self, epoch: int, images_in_epoch: int) -> None:
        """Say what the next iteration yields: the batches of `epoch` from this image on, counted over all ranks."""
        self._start = (epoch, images_in_epoch)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """This rank's batches; the last ones may be incomplete.

        Raises:
            DataError: a shard is not there or corrupt.
            StorageError: a shard did not come within `deadline_s`.
        """
        self.stop()
        world = self._parallel_rank_world.detect_workers()
        work = generate_work(self.batching_method, self, world, *self._start)
        mine = work[world.node, world.rank_of_node, world.worker_of_rank]  # (batches, rank_batch)
        del work
        fetcher = self._fetcher = _Fetcher(self, mine)
        try:
            for turn, padded in enumerate(mine):
                samples = padded[padded >= 0]
                if not len(samples):
                    return
                yield self._batch(samples, fetcher)
                fetcher.at(turn + 1)
        finally:
            fetcher.stop()

    def stop(self) -> None:
        """End the fetching of an epoch that is left early. Does not wait for a download that hangs."""
        if self._fetcher is not None:
            self._fetcher.stop()
            self._fetcher = None

    def shards_of(self, samples: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Shard and row in it of each sample (B,), as two (B,) arrays."""
        ends = self.sample_offset_per_shard + self.samples_per_shard
        shards = np.searchsorted(ends, samples, side="right")
        return shards, samples - self.sample_offset_per_shard[shards]

    def is_local(self, shard: int) -> bool:
        """Whether a shard lies in the cache."""
        return bool(self._shard_states[shard] == _LOCAL)

    def prepare(self, shard: int) -> None:
        """Fetch a shard unless it is there or another process is at it."""
        if self.is_local(shard):
            self._shard_access_times[shard] = time.time_ns()
            return
        try:
            self.prepare_shard(shard, blocking=False)
        except BaseException:
            # streaming leaves it in the state "being fetched", in which no other rank would try. It raises only in the
            # process that has put the shard into that state, which alone may change it.
            self._shard_states[shard] = _REMOTE
            raise

    def _batch(self, samples: np.ndarray[Any, Any], fetcher: _Fetcher) -> Batch:
        shards, rows = self.shards_of(samples)
        if self.cache_limit:
            # A mapped file keeps its room on the disk after it was removed.
            self._open = {shard: opened for shard, opened in self._open.items() if self.is_local(shard)}
        gathered: Records | None = None
        for shard in np.unique(shards):
            records = self._records(int(shard), fetcher)
            if gathered is None:
                gathered = np.empty(len(samples), records.dtype)
            here = np.flatnonzero(shards == shard)
            gathered[here] = records[rows[here]]
        assert gathered is not None  # noqa: S101 - there is a sample, so there is a shard
        return batch_of(gathered, self.id_offset)

    def _records(self, shard: int, fetcher: _Fetcher) -> Records:
        """The rows of a shard, as soon as it is there."""
        self._shard_access_times[shard] = time.time_ns()
        began = time.monotonic()
        while shard not in self._open:
            if self.is_local(shard):
                reader = self._shard(shard)
                try:
                    self._open[shard] = open_records(reader, Path(reader.dirname) / reader.raw_data.basename)
                    break
                except FileNotFoundError as error:  # evicted a moment ago, or removed by somebody else
                    if self.streams[0].remote is None:
                        raise _absent(reader.raw_data.basename, reader.dirname) from error
                    self._shard_states[shard] = _REMOTE
            fetcher.want(shard)
            waited = time.monotonic() - began
            if fetcher.failure is not None:
                raise self._named(fetcher.failure) from fetcher.failure
            if waited > self.deadline_s:
                fetcher.stop()
                raise self._away(shard, waited)
            time.sleep(_POLL_S)
        return self._open[shard]

    def _shard(self, shard: int) -> MDSReader:
        reader = self.shards[shard]
        assert isinstance(reader, MDSReader)  # noqa: S101 - latents are never stored in another format
        return reader

    def _away(self, shard: int, waited_s: float) -> StorageError:
        stream = self.streams[0]
        met = stream.trouble or "no answer yet"  # type: ignore[attr-defined]
        return StorageError(
            f"data.latents: rank {self.rank} waited {waited_s:.1f} s for shard {self._shard(shard).raw_data.basename} "
            f"of {stream.remote} (data.store_deadline_s={self.deadline_s:g}); the latest attempt met: {met}",
            "bring the store back and start the same command again, or wait longer with data.store_deadline_s",
        )

    def _named(self, failure: BaseException) -> DiffuSSMError:
        """A failure of the fetching thread as a typed error that names this rank."""
        if isinstance(failure, DiffuSSMError):
            return type(failure)(f"{failure.message} [rank {self.rank}]", failure.remedy)
        return StorageError(
            f"data.latents: rank {self.rank} cannot fetch shards of {self.streams[0].remote} to "
            f"{self.streams[0].local} ({type(failure).__name__}: {failure})",
            "check the store, and that the cache's disk has room",
        )

    def _forget_names(self) -> None:
        """Remove the names of the shared arrays, which all ranks of the node have open by now, from /dev/shm.

        The memory lives until the last process that has it open ends, in whatever way.
        """
        arrays = (
            self._shared_barrier._arr, self._next_epoch.arr, self._cache_usage.arr, self._shard_states,
            self._shard_access_times,
        )  # fmt: skip
        for memory in (self._locals_shm, *(array.shm for array in arrays)):
            for made in memory.created_shms:
                with contextlib.suppress(FileNotFoundError):
                    made.unlink()


class _Fetcher:
    """A thread that fetches the shards of coming batches, and first those that a batch already waits for."""

    def __init__(self, dataset: LatentDataset, batches: np.ndarray[Any, Any]) -> None:
        self.failure: BaseException | None = None
        self._dataset, self._batches = dataset, batches
        self._ahead = -(-(dataset.predownload or 1) // batches.shape[1])
        self._turn, self._wanted = 0, set[int]()
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        dataset.streams[0].stopping = self._stopping  # type: ignore[attr-defined]
        # A daemon: a request that hangs must not hold up the end of the process.
        threading.Thread(target=self._run, name="fetch shards", daemon=True).start()

    def at(self, turn: int) -> None:
        """Say that batch `turn` is read next."""
        with self._changed:
            self._turn = turn
            self._changed.notify()

    def want(self, shard: int) -> None:
        """Fetch this shard before any other."""
        with self._changed:
            if shard not in self._wanted:
                self._wanted.add(shard)
                self._changed.notify()

    def stop(self) -> None:
        """End, without waiting for it."""
        self._stopping.set()
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        try:
            for shard in self._next_shards():
                self._dataset.prepare(shard)
        except BaseException as failure:  # noqa: BLE001 - raised where the shard is needed
            if not self._stopping.is_set():
                self.failure = failure

    def _next_shards(self) -> Iterator[int]:
        """Shards in the order in which they are to be fetched, until told to stop."""
        turn, coming = 0, list[int]()
        while True:
            with self._changed:
                while not (self._stopping.is_set() or self._wanted or coming or self._may_fetch(turn)):
                    self._changed.wait()
                if self._stopping.is_set():
                    return
                wanted, self._wanted = self._wanted, set()
            yield from wanted
            if coming:
                yield coming.pop()
            elif self._may_fetch(turn):
                samples = self._batches[turn]
                coming = np.unique(self._dataset.shards_of(samples[samples >= 0])[0]).tolist()
                turn += 1

    def _may_fetch(self, turn: int) -> bool:
        """Whether batch `turn` is among those to be fetched by now."""
        return turn < len(self._batches) and turn <= self._turn + self._ahead


@contextlib.contextmanager
def own_names(prefix: int, folder: str) -> Iterator[None]:
    """Have streaming build its shared memory under `prefix` and its locks in `folder`, for one construction.

    It offers no option for either: it counts prefixes up from 0, which two jobs on a machine do at the same time, and
    puts locks into the machine's temp folder, where they stay.
    """
    prefixes, data = prefix_module, dataset_module
    saved = (prefixes._each_prefix_int, prefixes.gettempdir, data.gettempdir)
    prefixes._each_prefix_int = lambda: itertools.count(prefix)
    prefixes.gettempdir = data.gettempdir = lambda: folder
    try:
        yield
    finally:
        prefixes._each_prefix_int, prefixes.gettempdir, data.gettempdir = saved


def _absent(name: str, where: str) -> DataError:
    return DataError(
        f"data.latents: a shard, {name}, is missing at {where}",
        "check that all shards are there; make the latents again with `diffussm prepare`",
    )
