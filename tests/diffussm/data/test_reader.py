"""Reading while things go wrong: a store that is away, killed readers, a full disk's worth of evictions.

The store is a real S3 server behind a relay that can be cut, so that the other tests keep theirs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from urllib.parse import urlparse

import pytest

from diffussm.config.schema import Config
from diffussm.data import encode, latents
from diffussm.data.cursor import Cursor
from diffussm.errors import ConfigError, StorageError
from tests.diffussm.data import sets
from tests.diffussm.data.test_latents import open_here, read_ids
from tests.distributed import free_port
from tests.s3 import S3Server

ROOT = Path(__file__).parents[3]
SHM = Path("/dev/shm")  # noqa: S108
NUMBER, BATCH = 120, 8


class Relay:
    """Passes TCP on to a server. While `cut`, it refuses connections and breaks those that are open; `mute` lets them
    stand and passes nothing on, as a stopped server does.
    """

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.cut, self.mute = threading.Event(), threading.Event()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.cut.set()
        self.socket.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.target) as server:
            while not self.cut.is_set():
                ready, _, _ = select.select([client, server], [], [], 0.05)
                if self.mute.is_set() or self.cut.is_set():
                    continue
                for source in ready:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    (server if source is client else client).sendall(data)


@pytest.fixture
def relay(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    parts = urlparse(s3_server.endpoint)
    assert parts.hostname is not None
    assert parts.port is not None
    relay = Relay(parts.hostname, parts.port)
    monkeypatch.setenv("S3_ENDPOINT_URL", relay.url)
    yield relay
    relay.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Config:
    """Latents of 120 pictures in many small shards in a bucket."""
    root = tmp_path_factory.mktemp("reader")
    folder = sets.picture_folder(root / "pictures", {"a": 60, "b": 60})
    cfg = sets.config(
        s3_server.url("reader"), folder, sets.tiny_autoencoder(root / "vae"), BATCH, shard_bytes=1 << 12,
        shuffle_block_images=8, predownload_images=8,
    )  # fmt: skip
    cfg.prepare.unit_images = 12
    encode.prepare(cfg)
    return cfg


@pytest.fixture
def cfg(made: Config) -> Config:
    return deepcopy(made)


@pytest.fixture(scope="module")
def order(made: Config, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, list[int]]]:
    return read_ids(open_here(made, tmp_path_factory.mktemp("order")), Cursor(), 2 * NUMBER // BATCH)


def outage(
    cfg: Config, relay: Relay, scratch: Path, seconds: float, *, mute: bool = False
) -> list[tuple[int, list[int]]]:
    """Read two epochs; after three batches the store is away for so long."""
    data = open_here(cfg, scratch)
    batches = data.batches(Cursor())
    read = [(epoch, batch.id.tolist()) for epoch, batch in itertools.islice(batches, 3)]
    away = relay.mute if mute else relay.cut
    away.set()
    threading.Timer(seconds, away.clear).start()
    read += [(epoch, batch.id.tolist()) for epoch, batch in itertools.islice(batches, 2 * NUMBER // BATCH - 3)]
    batches.close()
    data.close()
    return read


def test_a_short_outage_loses_and_repeats_nothing(
    cfg: Config, relay: Relay, order: list[tuple[int, list[int]]], tmp_path: Path
) -> None:
    start = time.monotonic()
    assert outage(cfg, relay, tmp_path, 2.5) == order
    assert time.monotonic() - start >= 2.5, "the outage was never felt"


@pytest.mark.long
@pytest.mark.parametrize("mute", [False, True])
def test_an_outage_of_20_s_loses_and_repeats_nothing(
    cfg: Config, relay: Relay, order: list[tuple[int, list[int]]], tmp_path: Path, mute: bool
) -> None:
    start = time.monotonic()
    assert outage(cfg, relay, tmp_path, 20, mute=mute) == order
    assert time.monotonic() - start >= 20


@pytest.mark.parametrize("mute", [False, True])
def test_an_outage_beyond_the_deadline_stops_the_step(cfg: Config, relay: Relay, tmp_path: Path, mute: bool) -> None:
    cfg.data.store_deadline_s = 2
    data = open_here(cfg, tmp_path)
    batches = data.batches(Cursor())
    next(batches)
    (relay.mute if mute else relay.cut).set()
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"rank 0 waited 2\.\d s for shard \S+\.mds of s3://") as caught:
        list(itertools.islice(batches, NUMBER // BATCH))
    assert 2 <= time.monotonic() - start < 4
    assert "data.store_deadline_s" in caught.value.remedy
    data.close()
    assert time.monotonic() - start < 5


def test_a_loader_worker_reports_the_outage_too(cfg: Config, relay: Relay, tmp_path: Path) -> None:
    cfg.data.store_deadline_s, cfg.data.loader_workers = 5, 1  # the first batch may take a second, too
    data = open_here(cfg, tmp_path)
    batches = data.batches(Cursor())
    next(batches)
    relay.cut.set()
    with pytest.raises(StorageError, match=r"for shard \S+\.mds"):
        list(itertools.islice(batches, NUMBER // BATCH))


def test_a_limited_cache_evicts_and_reads_the_same(
    cfg: Config, order: list[tuple[int, list[int]]], tmp_path: Path
) -> None:
    cfg.data.cache_limit_bytes = 1
    with pytest.raises(ConfigError, match=r"data\.cache_limit_bytes: found 1; allowed here") as caught:
        open_here(cfg, tmp_path / "a")
    least = int(caught.value.remedy.split("data.cache_limit_bytes=")[1].split(",")[0])
    cfg.data.cache_limit_bytes = least
    data = open_here(cfg, tmp_path / "b")
    read = []
    sizes = []
    for epoch, batch in itertools.islice(data.batches(Cursor()), len(order)):
        read.append((epoch, batch.id.tolist()))
        sizes.append(sum(f.stat().st_size for f in (tmp_path / "b").rglob("*.mds") if f.is_file()))
    data.close()
    assert read == order
    whole = sum(f.stat().st_size for f in (tmp_path / "b").rglob("index.json"))
    assert max(sizes) + whole <= least


def test_names_are_our_own_and_none_stays(cfg: Config, tmp_path: Path) -> None:
    import streaming.base.shared.prefix as prefixes

    before = (prefixes._each_prefix_int, prefixes.gettempdir)
    # What a killed job left under streaming's first name, unless another process of this machine has it just now.
    stale = None
    with contextlib.suppress(FileExistsError):
        stale = SharedMemory("000000_locals", create=True, size=64)
    try:
        data = open_here(cfg, tmp_path)
        numbers = {reader._shm_prefix_int for reader in data._readers}
        assert min(numbers) >= 1_000_000
        assert read_ids(data, Cursor(), 1)
        assert not [file.name for file in SHM.iterdir() if file.name.split("_")[0] in map(str, numbers)]
        assert open_here(cfg, tmp_path)._readers[0]._shm_prefix_int not in numbers
        assert (prefixes._each_prefix_int, prefixes.gettempdir) == before
    finally:
        if stale is not None:
            stale.close()
            stale.unlink()


READ = """
import os, pathlib, pickle, sys, time
import torch.distributed as dist
from diffussm.data import latents
from diffussm.data.cursor import Cursor
cfg, scratch = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()), pathlib.Path(sys.argv[2])
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
(scratch / str(rank)).mkdir(parents=True, exist_ok=True)
data = latents.open_latents(cfg, rank_batch=cfg.train.global_batch // 2, scratch=scratch / str(rank))
batches = data.batches(Cursor())
next(batches)
print("reading", data._readers[0]._shm_prefix_int, flush=True)
time.sleep(300 if sys.argv[3] == "wait" else 0)
if sys.argv[3] == "fail":
    raise ValueError("on purpose")
"""
"""Two ranks read one batch; then they wait to be killed, fail, or come to their end."""


@pytest.mark.parametrize(
    "end", ["tree", *(pytest.param(end, marks=pytest.mark.long) for end in ("rank", "fail", "end"))]
)
def test_start_after_any_end(cfg: Config, order: list[tuple[int, list[int]]], tmp_path: Path, end: str) -> None:
    """However two ranks end, /dev/shm is as before, and the next start uses the same folders and is not blocked."""
    cfg.data.cache = str(tmp_path / "cache")
    (tmp_path / "cfg").write_bytes(pickle.dumps(cfg))
    shared = os.environ | {
        "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    mode = "wait" if end in ("rank", "tree") else end
    command = [sys.executable, "-c", READ, str(tmp_path / "cfg"), str(tmp_path / "scratch"), mode]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        prefixes = set()
        for process in ranks:
            assert process.stdout is not None
            word, prefix = process.stdout.readline().split()
            assert word == "reading"
            prefixes.add(prefix)
        assert len(prefixes) == 1
        if end == "rank":
            ranks[1].send_signal(signal.SIGKILL)  # then the other is ended, as Ray does
            ranks[1].wait()
            ranks[0].terminate()
        elif end == "tree":
            for process in ranks:
                os.killpg(process.pid, signal.SIGKILL)  # with Python's own cleaner of shared memory
        for process in ranks:
            process.wait(60)
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    assert not [file.name for file in SHM.iterdir() if file.name.split("_")[0] in prefixes]
    (tmp_path / "cache" / next((tmp_path / "cache").iterdir()).name / f"shard.mds.{ranks[0].pid}.part").touch()
    (tmp_path / "cache" / next((tmp_path / "cache").iterdir()).name / f"arriving-{ranks[0].pid}-x").mkdir()
    assert read_ids(open_here(cfg, tmp_path / "scratch"), Cursor(), 3) == order[:3]
    assert not [*(tmp_path / "cache").rglob("*.part"), *(tmp_path / "cache").rglob("arriving-*")]


def test_corrupt_cache_is_named(cfg: Config, tmp_path: Path) -> None:
    from diffussm.errors import DataError

    cfg.data.cache = str(tmp_path / "cache")
    read_ids(open_here(cfg, tmp_path / "a"), Cursor(), NUMBER // BATCH)
    shard = sorted((tmp_path / "cache").rglob("*.mds"))[2]
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(DataError, match=rf"shard {shard.name} is corrupt") as caught:
        read_ids(open_here(cfg, tmp_path / "b"), Cursor(), NUMBER // BATCH)
    assert "remove the file if it is in a cache" in caught.value.remedy
    shard.unlink()
    assert len(read_ids(open_here(cfg, tmp_path / "c"), Cursor(), NUMBER // BATCH)) == NUMBER // BATCH


def test_a_damaged_index_in_the_cache_is_fetched_again(cfg: Config, tmp_path: Path) -> None:
    cfg.data.cache = str(tmp_path / "cache")
    first = read_ids(open_here(cfg, tmp_path / "a"), Cursor(), 3)
    (index,) = (tmp_path / "cache").rglob(latents.INDEX)
    whole = index.read_bytes()
    index.write_bytes(whole[:-10])
    assert read_ids(open_here(cfg, tmp_path / "b"), Cursor(), 3) == first
    assert index.read_bytes() == whole
    assert not list(index.parent.glob("arriving*"))


def test_latents_are_what_the_bucket_has(cfg: Config) -> None:
    assert latents.passport(cfg.data.latents).number == NUMBER
