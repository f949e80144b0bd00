"""The reader of latents against the training that eats them, a folder of `.npy` files, and WebDataset tars.

All sides read the same latents in the same processes, in turns. The latents are those of a config, as often as needed
to make a set worth reading; they and the tars lie at a URL, the `.npy` files always in a local folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import queue
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from diffussm.bench import rivals
from diffussm.checkpoint.store import open_store
from diffussm.config.schema import Config
from diffussm.data import latents, shards
from diffussm.data.cursor import Cursor
from diffussm.data.passport import FILE
from diffussm.data.records import Records, open_records, reader_of
from diffussm.errors import InfrastructureError
from diffussm.naming import join

SIDES = ("diffussm", "npy", "webdataset")
_SHARD_BYTES = 1 << 22
_START_S = 300.0


@dataclass(frozen=True)
class DataRow:
    """One side with so many ranks on this machine."""

    side: str
    ranks: int
    samples_per_s: float
    """Median over the rounds, all ranks together, once everything is in the cache."""
    low: float
    high: float
    first_epoch_samples_per_s: float
    """The first pass, with an empty cache."""
    first_batch_s: float
    """From an open process group to the first batch, with an empty cache; the slowest rank."""
    cold_start_s: float
    """The same from the start of the processes on; the imports are the same for all sides."""
    over_training: float
    """Samples a second over those that one worker's training step takes."""
    over_npy: float
    """Samples a second over those of the `.npy` folder with as many ranks."""


@dataclass(frozen=True)
class _Job:
    """What each rank measures."""

    cfg: Config
    url: str
    tars: tuple[str, ...]
    npy: str
    number: int
    rounds: int
    scratch: str
    began: float
    """Seconds since the epoch, just before the processes are started."""


def bench_data(
    cfg: Config, url: str, *, ranks: list[int], samples: int, rounds: int, train_samples_per_s: float
) -> list[DataRow]:
    """Measure all sides.

    Args:
        cfg: a checked config whose latents exist.
        url: folder or s3:// URL for the set and the tars; what is written below it is removed at the end.
        ranks: numbers of processes, one measurement each.
        samples: size of the set.
        rounds: passes over the set after the first one.
        train_samples_per_s: what one worker's training step takes.

    Raises:
        DataError, StorageError: the latents cannot be read, or the URL not be written.
        MissingError: a package of the other side is not installed.
    """
    place = join(url, f"bench-data-{secrets.token_hex(4)}")
    store = open_store(place)
    try:
        with tempfile.TemporaryDirectory(prefix="diffussm-bench-") as scratch:
            rows = _rows(cfg, samples)
            set_url = join(place, "set")
            _write_set(cfg, set_url, rows, Path(scratch))
            # WebDataset gives whole tars to ranks, so that each needs some.
            tars = rivals.write_tars(store, rows, min(_SHARD_BYTES, rows.nbytes // (4 * max(ranks))))
            rivals.write_npy(Path(scratch) / "npy", rows)
            mine = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, latents=set_url, cache="", more=[]))
            found: list[DataRow] = []
            for number in ranks:
                job = _Job(mine, place, tuple(tars), str(Path(scratch) / "npy"), samples, rounds, scratch, time.time())
                found += _table(_on_ranks(job, number), number, samples, train_samples_per_s)
    finally:
        for key in list(store.keys()):
            store.delete(key)
    return found


def _rows(cfg: Config, samples: int) -> Records:
    """The config's latents, again and again, under ids of their own."""
    store = open_store(latents.local_path(cfg.data.latents))
    index = json.loads(store.read(latents.INDEX))
    parts = []
    with tempfile.TemporaryDirectory(prefix="diffussm-bench-") as scratch:
        for shard in index["shards"]:
            path = store.fetch(shard["raw_data"]["basename"], Path(scratch))
            parts.append(np.array(open_records(reader_of(shard, path.parent), path)))
    rows = np.resize(np.concatenate(parts), samples)
    rows["id"] = np.arange(samples)
    return rows


def _write_set(cfg: Config, url: str, rows: Records, scratch: Path) -> None:
    """A set of latents with index and passport."""
    made = latents.passport(cfg.data.latents)
    columns = {"id": "int", "label": "int"}
    for name in rows.dtype.names or ():
        if name not in columns:
            field = rows.dtype[name]
            columns[name] = f"ndarray:{field.base.name}:{','.join(map(str, field.shape))}"
    store, folder = open_store(url), scratch / "writing"
    with shards.unit_writer(folder, columns, _SHARD_BYTES) as writer:
        for row in rows:
            sample: dict[str, Any] = {name: row[name] for name in columns}
            writer.write(sample | {"id": int(row["id"]), "label": int(row["label"])})
    index = shards.index_json(shards.publish(store, folder, 0))
    store.write(latents.INDEX, index)
    passport = dataclasses.replace(made, number=len(rows), index_digest=hashlib.sha256(index).hexdigest())
    store.write(FILE, passport.to_json().encode())


def _on_ranks(job: _Job, ranks: int) -> list[dict[str, list[float]]]:
    """Seconds of each rank by side: to a process group, then to the first batch, of the first pass, of each round."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    meet = f"{job.scratch}/meet-{secrets.token_hex(4)}"
    processes = [context.Process(target=_rank, args=(job, rank, ranks, meet, results)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        found: list[dict[str, list[float]]] = []
        deadline = time.monotonic() + _START_S + 60.0 * job.rounds
        while len(found) < ranks:
            try:
                value = results.get(timeout=1.0)
            except queue.Empty:
                _expect_alive(processes, deadline)
                continue
            if isinstance(value, BaseException):
                raise value
            found.append(value)
        return found
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _expect_alive(processes: Sequence[Any], deadline: float) -> None:
    codes = [process.exitcode for process in processes if process.exitcode]
    if codes:
        raise InfrastructureError(f"a rank that measures ended with code {codes[0]}", "see what killed it: memory?")
    if time.monotonic() > deadline:
        raise InfrastructureError("the ranks that measure did not end in time", "set a smaller --samples or --rounds")


def _rank(job: _Job, rank: int, ranks: int, meet: str, results: Any) -> None:
    try:
        results.put(_measure(job, rank, ranks, meet))
    except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
        results.put(error)


def _measure(job: _Job, rank: int, ranks: int, meet: str) -> dict[str, list[float]]:
    """Collective: every rank runs it."""
    alike = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in alike.items()})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
    started = time.time() - job.began
    share = job.cfg.train.global_batch // ranks
    passes = job.number // job.cfg.train.global_batch
    opened = _openers(job, rank, ranks, share)
    seconds: dict[str, list[float]] = {}
    running = {}
    for side, opener in opened.items():
        dist.barrier()
        start = time.perf_counter()
        running[side] = opener()
        next(running[side])
        first = time.perf_counter() - start
        _read(running[side], passes - 1)
        seconds[side] = [started, first, time.perf_counter() - start]
    for _ in range(job.rounds):
        for side, batches in running.items():
            dist.barrier()
            start = time.perf_counter()
            _read(batches, passes)
            seconds[side].append(time.perf_counter() - start)
    dist.barrier()
    dist.destroy_process_group()
    return seconds


def _openers(job: _Job, rank: int, ranks: int, share: int) -> dict[str, Callable[[], Iterator[Any]]]:
    scratch = Path(job.scratch) / f"ranks-{ranks}" / str(rank)
    scratch.mkdir(parents=True)

    def ours() -> Iterator[Any]:
        data = latents.open_latents(job.cfg, rank_batch=share, scratch=scratch)
        return (batch for _, batch in data.batches(Cursor()))

    return {
        "diffussm": ours,
        "npy": lambda: rivals.npy_batches(Path(job.npy), job.number, share, rank, ranks),
        "webdataset": lambda: rivals.tar_batches(job.url, list(job.tars), scratch / "tars", share, rank, ranks),
    }


def _read(batches: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(batches)


def _table(
    seconds: list[dict[str, list[float]]], ranks: int, samples: int, train_samples_per_s: float
) -> list[DataRow]:  # fmt: skip
    """Rows from the seconds of each rank; the slowest rank counts."""
    rates: dict[str, list[float]] = {}
    starts: dict[str, tuple[float, float]] = {}
    for side in SIDES:
        slowest = [max(values) for values in zip(*(rank[side] for rank in seconds), strict=True)]
        starts[side] = (slowest[1], slowest[0] + slowest[1])
        rates[side] = [samples / value for value in slowest[2:]]
    npy = statistics.median(rates["npy"][1:])
    return [
        DataRow(
            side, ranks, middle := statistics.median(rates[side][1:]), min(rates[side][1:]), max(rates[side][1:]),
            rates[side][0], *starts[side], middle / train_samples_per_s, middle / npy,
        )
        for side in SIDES
    ]  # fmt: skip
