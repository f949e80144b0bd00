"""A store that dies in the middle of an upload and returns, one that is slow, one that is full: nothing is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffussm.checkpoint import restore, store
from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.save import save
from diffussm.checkpoint.snapshot import Part
from diffussm.checkpoint.store import Store, open_store
from diffussm.errors import StorageError
from tests.s3 import S3Server
from tests.wire import Wire

NUMEL = 3 << 20
"""Elements of 4 bytes: three parts of an upload."""


@pytest.fixture
def bucket(s3_server: S3Server, tmp_path: Path) -> tuple[str, str]:
    return s3_server.endpoint, s3_server.url(f"outage/{tmp_path.name}")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    size = NUMEL * 4 * 3 // 2
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def save_step(at: Store, step: int, deadline_s: float = 120.0) -> None:
    parts = [Part("w", (NUMEL,), 0, {"master": state(step)})]
    counters = Counters(step, step, 0, step, step, 0)
    save(
        at, f"checkpoints/{step:012d}", parts, {"w": (NUMEL,)}, counters,
        attempt=1, zero_stage=1, config_digest="d", deadline_s=deadline_s,
    )  # fmt: skip


def state(step: int) -> torch.Tensor:
    return torch.arange(NUMEL, dtype=torch.float32) + step


def assert_holds(at: Store, step: int) -> None:
    folder, manifest = restore.choose(at)
    assert manifest.counters.step == step
    assert torch.equal(restore.read_weights(at, folder, manifest, "master")["w"], state(step))


def through(wire: Wire, url: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("S3_ENDPOINT_URL", wire.endpoint)
    monkeypatch.setattr(store, "PART_BYTES", 5 << 20)
    return open_store(url)


@pytest.mark.world_size(1)
def test_an_upload_goes_on_when_the_store_returns(bucket: tuple[str, str]) -> None:
    wire = Wire(bucket[0])
    with pytest.MonkeyPatch.context() as monkeypatch:
        at = through(wire, bucket[1], monkeypatch)
        save_step(at, 1)
        wire.cut_after, wire.refusals = wire._sent + NUMEL * 2, 3  # in the middle of the second upload
        save_step(at, 2)
    assert wire.cuts == 1
    assert wire.refused == 3
    assert_holds(open_store(bucket[1]), 2)
    wire.close()


@pytest.mark.world_size(1)
def test_a_slow_store_fails_at_the_deadline_and_loses_nothing(bucket: tuple[str, str]) -> None:
    wire = Wire(bucket[0])
    with pytest.MonkeyPatch.context() as monkeypatch:
        at = through(wire, bucket[1], monkeypatch)
        save_step(at, 1)
        wire.bytes_per_s = NUMEL / 16  # over a minute for all four times as many
        with pytest.raises(StorageError, match=r"rank 0: .*rank00000\.safetensors: not stored within"):
            save_step(at, 2, deadline_s=2.0)
        assert_holds(open_store(bucket[1]), 1)
        wire.bytes_per_s = None
        save_step(at, 3)
    assert_holds(open_store(bucket[1]), 3)
    wire.close()


@pytest.mark.world_size(1)
def test_a_full_disk_leaves_the_checkpoint_before_and_no_litter(full_disk: Path) -> None:
    at = open_store(str(full_disk))
    save_step(at, 1)
    with pytest.raises(StorageError, match="No space left on device") as failed:
        save_step(at, 2)
    assert "room" in failed.value.remedy
    assert_holds(at, 1)
    assert not list(at.unfinished(""))
    for key in list(at.keys("checkpoints/000000000001/")):
        at.delete(key)
    save_step(at, 2)
    assert_holds(at, 2)
