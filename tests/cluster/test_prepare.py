"""Latents made on a real Ray cluster: the same bytes for every number of workers and whoever is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import env
from cluster.prepare import verdict
from diffussm.checkpoint.store import open_store
from diffussm.config import dump
from diffussm.config.schema import Config, OnCorrupt
from diffussm.data import encode
from diffussm.data.picture import CorruptImageError
from diffussm.errors import DataError, InfrastructureError
from tests.diffussm.data import sets
from tests.s3 import BUCKET, S3Server

IMAGES = {"a": 40, "b": 31, "c": 25}

pytestmark = pytest.mark.timeout(900)  # encoders start several times, and a loaded machine takes minutes


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray

    given = env.apply(Config())
    ray.init(
        address="local", num_cpus=8, object_store_memory=100 << 20, log_to_driver=False,
        runtime_env={"env_vars": given},
    )  # fmt: skip
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("inputs")
    pictures = sets.picture_folder(root / "pictures", IMAGES)
    (pictures / "b" / "007.png").write_bytes(b"no picture")
    return pictures, sets.tiny_autoencoder(root / "vae")


@pytest.fixture
def cfg(inputs: tuple[Path, Path], tmp_path: Path) -> Config:
    cfg = sets.config(str(tmp_path / "latents"), *inputs, shard_bytes=1 << 16)
    cfg.prepare.unit_images, cfg.prepare.batch, cfg.prepare.max_failures = 8, 4, 0
    return cfg


def contents(place: str) -> dict[str, bytes]:
    store = open_store(place)
    return {key: store.read(key) for key in store.keys("")}


def prepare(cfg: Config, workers: int, hear: Any = None, before: Any = None) -> list[dict[str, Any]]:
    """Prepare on `workers`; `hear` gets each announcement and `before` the images done at each progress."""
    from cluster.prepare import run

    cfg.prepare.workers = workers
    said: list[dict[str, Any]] = []

    def announce(record: dict[str, Any]) -> None:
        said.append(record)
        if hear:
            hear(record)

    def progress(done: int, total: int) -> None:
        if before:
            before(done)

    encode.prepare(cfg, progress=progress, device="cpu", run=lambda work, tell: run(work, tell, announce))
    return said


def test_the_budget_is_counted_and_names_what_was_in_hand() -> None:
    assert verdict(0, 0, {}) == ""
    assert verdict(3, 3, {7: 3}) == ""
    said = verdict(4, 3, {7: 3, 1: 1, 2: 1, 3: 1})
    assert "prepare.max_failures=3" in said
    assert "unit 7 (3 times), unit 1 (1 times), unit 2 (1 times)" in said


def same_for(workers: int, cfg: Config, tmp_path: Path, alone: dict[str, bytes]) -> None:
    cfg.data.latents = str(tmp_path / f"by-{workers}")
    said = prepare(cfg, workers)
    ready = {record["pid"] for record in said if record["event"] == "encoder ready"}
    assert len(ready) <= workers
    assert os.getpid() not in ready
    assert contents(cfg.data.latents) == alone


def kill_some(cfg: Config, kills: int, seed: int) -> tuple[int, list[dict[str, Any]]]:
    """Prepare on two workers and kill one at random moments; returns how many were killed."""
    chance = random.Random(seed)  # noqa: S311 - a test's dice
    alive: list[int] = []
    killed = 0

    def hear(record: dict[str, Any]) -> None:
        if record["event"] == "encoder ready":
            alive.append(record["pid"])
            # At once, while it works on its first units, or later.
            if chance.random() < 0.5:
                strike(0)

    def strike(done: int) -> None:
        nonlocal killed
        if alive and killed < kills and (done == 0 or chance.random() < 0.7):
            os.kill(alive.pop(chance.randrange(len(alive))), signal.SIGKILL)
            killed += 1

    cfg.prepare.max_failures = 2 * kills
    said = prepare(cfg, 2, hear, strike)
    return killed, said


def test_killed_workers_cost_their_units_and_no_byte(cluster: Any, cfg: Config, tmp_path: Path) -> None:
    encode.prepare(cfg, device="cpu")
    alone = contents(cfg.data.latents)
    cfg.data.latents = str(tmp_path / "killed")
    killed, said = kill_some(cfg, 2, seed=1)
    lost = [record for record in said if record["event"] == "encoder lost"]
    assert killed >= 1
    assert len(lost) >= killed - 1  # the last one may have had nothing left to do
    assert all(len(record["units"]) <= encode.UNITS_AT_ONCE for record in lost)
    assert contents(cfg.data.latents) == alone


def test_beyond_the_budget_it_stops_and_the_next_start_goes_on(cluster: Any, cfg: Config, tmp_path: Path) -> None:
    encode.prepare(cfg, device="cpu")
    alone = contents(cfg.data.latents)
    cfg.data.latents = str(tmp_path / "stopped")
    alive: list[int] = []

    def hear(record: dict[str, Any]) -> None:
        if record["event"] == "encoder ready":
            alive.append(record["pid"])

    def kill(done: int) -> None:
        if done >= 40 and alive:
            os.kill(alive.pop(), signal.SIGKILL)

    with pytest.raises(InfrastructureError, match=r"prepare\.max_failures=0"):
        prepare(cfg, 1, hear, kill)
    assert not (Path(cfg.data.latents) / "passport.json").exists()
    done: list[int] = []
    encode.prepare(cfg, progress=lambda images, of: done.append(images), device="cpu")
    assert done[0] >= 40
    assert contents(cfg.data.latents) == alone


@pytest.mark.long
def test_faults_of_the_pictures_come_back_typed_and_are_not_retried(cluster: Any, cfg: Config) -> None:
    cfg.data.on_corrupt = OnCorrupt.fail
    with pytest.raises(CorruptImageError, match=r"b/007\.png") as caught:
        prepare(cfg, 1)
    assert caught.value.kind == "no-image"
    cfg.data.on_corrupt = OnCorrupt.skip
    vae = Path(cfg.data.autoencoder) / "diffusion_pytorch_model.safetensors"
    whole = vae.read_bytes()
    try:
        vae.write_bytes(whole[:-10])
        cfg.data.latents += "-other"
        with pytest.raises(DataError, match="cannot be loaded"):
            prepare(cfg, 1)
    finally:
        vae.write_bytes(whole)


def driver(config: Path, log: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """`diffussm prepare` in a process group of its own."""
    command = [sys.executable, "-P", "-m", "cluster.driver", "--only", "prepare", str(config), *overrides]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def kill_driver(process: subprocess.Popen[bytes], place: Path, units: int, log: Path, wait_s: float = 120.0) -> bool:
    """Kill the driver and all below it once `units` more units are done; False if it ended well before."""
    ledger = place / "ledger"
    before = len(list(ledger.glob("0*.json")))
    deadline = time.monotonic() + wait_s
    while len(list(ledger.glob("0*.json"))) < before + units:
        if process.poll() is not None:
            assert process.returncode == 0, log.read_text()[-3000:]
            return False
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


@pytest.fixture
def config(cfg: Config, tmp_path: Path) -> Path:
    cfg.storage, cfg.train.images = str(tmp_path / "runs"), 8
    path = tmp_path / "c.yaml"
    path.write_text(dump(cfg))
    return path


def test_a_killed_driver_goes_on_where_it_was(cfg: Config, config: Path, tmp_path: Path) -> None:
    encode.prepare(cfg, device="cpu")
    alone = contents(cfg.data.latents)
    place, log = tmp_path / "killed", tmp_path / "log"
    cfg.data.latents = str(place)
    assert kill_driver(driver(config, log, f"data.latents={place}"), place, 2, log)
    assert not (place / "passport.json").exists()
    done: list[int] = []
    encode.prepare(cfg, progress=lambda images, of: done.append(images), device="cpu")
    assert done[0] >= 16
    assert contents(cfg.data.latents) == alone
    assert not list(Path(tempfile.gettempdir()).glob(f"diffussm-prepare-*-{os.getpid()}-*"))


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_thirty_kills_of_workers_and_drivers_cost_no_byte(cluster: Any, cfg: Config, tmp_path: Path) -> None:
    """Workers first, at 1, 2 and 4 of them, then whole drivers with their Ray, at moments that dice choose."""
    cfg.prepare.unit_images = 2
    encode.prepare(cfg, device="cpu")
    alone = contents(cfg.data.latents)
    for workers in (1, 2, 4):
        same_for(workers, cfg, tmp_path, alone)
    total = 0
    for seed in range(100):
        cfg.data.latents = str(tmp_path / f"workers-{seed}")
        killed, _ = kill_some(cfg, 8, seed)
        total += killed
        assert contents(cfg.data.latents) == alone
        if total >= 22:
            break
    chance = random.Random(5)  # noqa: S311 - a test's dice
    cfg.storage, cfg.train.images, cfg.prepare.max_failures = str(tmp_path / "runs"), 8, 4
    place, log = tmp_path / "drivers", tmp_path / "log"
    drivers = 0
    while drivers < 8:
        cfg.data.latents, cfg.prepare.workers = str(place), chance.choice([0, 1, 2])
        (tmp_path / "c.yaml").write_text(dump(cfg))
        if kill_driver(driver(tmp_path / "c.yaml", log), place, chance.randrange(1, 6), log):
            drivers += 1
            continue
        assert contents(str(place)) == alone
        place = tmp_path / f"drivers-{drivers}"
    cfg.data.latents = str(place)
    encode.prepare(cfg, device="cpu")
    assert contents(str(place)) == alone
    print(f"{total} workers and {drivers} drivers killed")
    assert total + drivers >= 30


@pytest.mark.long
def test_from_bucket_to_bucket_on_two_workers_and_over_a_killed_driver(
    cfg: Config, tmp_path: Path, s3_server: S3Server
) -> None:
    """The ledger lies in the bucket too; workers find it by the environment of their driver."""
    for path in Path(cfg.data.images).rglob("*.png"):
        key = f"prepare-in/{path.relative_to(cfg.data.images).as_posix()}"
        s3_server.client().upload_file(str(path), BUCKET, key)
    cfg.data.images, cfg.storage, cfg.train.images = s3_server.url("prepare-in"), str(tmp_path / "runs"), 8
    cfg.prepare.max_failures = 4
    encode.prepare(cfg, device="cpu")
    alone = contents(cfg.data.latents)
    cfg.data.latents, cfg.prepare.workers = s3_server.url("prepare-out"), 2
    path, log = tmp_path / "c.yaml", tmp_path / "log"
    path.write_text(dump(cfg))
    process = driver(path, log)
    deadline = time.monotonic() + 120
    while len(s3_server.keys("prepare-out/ledger/0")) < 3:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not s3_server.keys("prepare-out/passport.json")
    assert driver(path, log).wait(200) == 0, log.read_text()[-3000:]
    assert contents(cfg.data.latents) == alone
