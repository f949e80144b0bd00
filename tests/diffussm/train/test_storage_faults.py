"""Whole trainings whose storage dies, refuses them or is full: they go on or stop with a word, and lose nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffussm.checkpoint import restore
from diffussm.checkpoint.store import NotFound, Store, open_store
from diffussm.config.schema import Config
from tests import kills
from tests.disks import small_disk
from tests.runs import BATCH, tiny_run
from tests.s3 import S3Server
from tests.wire import Wire

STEPS = 20


def store_of(cfg: Config) -> Store:
    return open_store(f"{cfg.storage}/{cfg.name}")


def records(cfg: Config, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store_of(cfg).read(name).splitlines()]


def everything(cfg: Config) -> dict[str, bytes]:
    store = store_of(cfg)
    return {key: store.read(key) for key in list(store.keys())}


def losses(cfg: Config) -> dict[int, float]:
    return {record["images"]: record["loss"] for record in records(cfg, "metrics.jsonl")}


def state(cfg: Config) -> dict[str, torch.Tensor]:
    folder, manifest = restore.choose(store_of(cfg))
    assert manifest.counters.images == cfg.train.images
    return {
        f"{kind}/{name}": tensor
        for kind in manifest.kinds
        for name, tensor in restore.read_weights(store_of(cfg), folder, manifest, kind).items()
    }


def assert_the_same_run(found: Config, expected: Config) -> None:
    assert len(losses(expected)) == STEPS
    assert losses(found) == losses(expected)
    states = state(found), state(expected)
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert torch.equal(states[0][name], tensor), name


def until(true: Callable[[], bool], ranks: list[Any]) -> None:
    """Wait for something that a running attempt brings about."""
    gate = threading.Event()
    while not true():
        assert ranks[0].is_alive()
        gate.wait(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run on a local disk."""
    folder = tmp_path_factory.mktemp("whole")
    cfg = tiny_run(folder, images=STEPS * BATCH, checkpoint_images=4 * BATCH)
    assert not kills.attempt(cfg, folder, 1).errors
    return cfg


def test_the_server_dies_in_an_upload_and_the_training_goes_on_without_it(
    tmp_path: Path, mortal_s3: S3Server, whole: Config
) -> None:
    """It dies in the save of step 8 and returns before the last step: none has waited for it, and nothing is lost."""
    cfg = replace(whole, name="mortal", storage=mortal_s3.url("runs"))
    wire = Wire(mortal_s3.endpoint)
    wire.on_cut = mortal_s3.kill
    first, second = tmp_path / "hold-6", tmp_path / "hold-10"
    first.touch()
    second.touch()
    environment = mortal_s3.variables | {"S3_ENDPOINT_URL": wire.endpoint}
    ranks = kills.start(cfg, tmp_path, 1, patch="hold_where_told", environment=environment)
    until(lambda: bool(list(restore.manifests(store_of(cfg)))), ranks)
    wire.cut_after = wire._sent + (1 << 17)  # some way into the next checkpoint's file
    first.unlink()
    until(lambda: wire.cuts == 1, ranks)
    second.unlink()
    until(lambda: len((tmp_path / "steps-mortal-1-0.jsonl").read_text().splitlines()) >= STEPS - 1, ranks)
    assert mortal_s3.process.poll() is not None
    mortal_s3.revive()
    ended = kills.finish(ranks, tmp_path)
    wire.close()
    assert not ended.errors, ended.errors
    assert_the_same_run(cfg, whole)
    skipped = [record["images"] for record in records(cfg, "events.jsonl") if record.get("event") == "save skipped"]
    assert skipped == [12 * BATCH, 16 * BATCH], "one save is under way at a time"
    for folder, manifest in restore.manifests(store_of(cfg)):
        assert not restore.verify(store_of(cfg), folder, manifest)  # type: ignore[arg-type]


def test_a_kill_loses_no_line_of_a_step_that_is_saved(tmp_path: Path, s3_server: S3Server, whole: Config) -> None:
    """A journal in a bucket rests between its puts, here for ever; a checkpoint waits for the lines before it."""
    cfg = replace(whole, name="lines", storage=s3_server.url(f"lines/{tmp_path.name}"))
    hold = tmp_path / "hold-10"
    hold.touch()
    ranks = kills.start(cfg, tmp_path, 1, patch="rest_and_hold", environment=s3_server.variables)
    until(lambda: bool(list(restore.manifests(store_of(cfg)))), ranks)
    ranks[0].kill()
    ranks[0].join()
    saved = restore.choose(store_of(cfg))[1].counters.images
    assert sorted(losses(cfg))[: saved // BATCH] == list(range(BATCH, saved + 1, BATCH))
    hold.unlink()
    ended = kills.attempt(cfg, tmp_path, 1, environment=s3_server.variables)
    assert not ended.errors, ended.errors
    assert_the_same_run(cfg, whole)


def test_wrong_credentials_stop_a_start_and_change_nothing(tmp_path: Path, s3_server: S3Server, whole: Config) -> None:
    cfg = replace(whole, name="locked", storage=s3_server.url(f"runs/{tmp_path.name}"))
    half = replace(cfg, train=replace(cfg.train, images=STEPS // 2 * BATCH))
    assert not kills.attempt(half, tmp_path, 1, environment=s3_server.variables).errors
    before = everything(cfg)
    wrong = s3_server.variables | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    ended = kills.attempt(cfg, tmp_path, 1, environment=wrong)
    assert "StorageError: " in ended.errors[0]
    assert "check the credentials and the bucket's rights" in ended.errors[0]
    assert everything(cfg) == before
    assert not kills.attempt(cfg, tmp_path, 1, environment=s3_server.variables).errors
    assert_the_same_run(cfg, whole)


def test_a_full_disk_stops_the_run_after_its_failures_and_it_goes_on_when_there_is_room(
    tmp_path: Path, whole: Config
) -> None:  # fmt: skip
    size = sum(path.stat().st_size for path in Path(whole.storage, whole.name).rglob("*") if path.is_file())
    with small_disk(tmp_path / "disk", 4 * size) as disk:
        cfg = replace(whole, name="full", storage=str(disk))
        half = replace(cfg, train=replace(cfg.train, images=STEPS // 2 * BATCH))
        assert not kills.attempt(half, tmp_path, 1).errors
        good = [folder for folder, _ in restore.manifests(store_of(cfg))]
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(1 << 16)):
                pass
        with (disk / "filler").open("r+b") as filler:  # room for records of what happens, not for a checkpoint
            filler.truncate((disk / "filler").stat().st_size - (1 << 17))
        ended = kills.attempt(cfg, tmp_path, 1)
        assert "StorageError: " in ended.errors[0]
        assert "No space left on device" in ended.errors[0]
        assert "has room" in ended.errors[0]
        assert [folder for folder, _ in restore.manifests(store_of(cfg))] == good
        assert "save failed" in [record.get("event") for record in records(cfg, "events.jsonl")]
        (disk / "filler").unlink()
        assert not kills.attempt(cfg, tmp_path, 1).errors
        assert_the_same_run(cfg, whole)
        with suppress(NotFound):
            assert not list(store_of(cfg).unfinished(""))
