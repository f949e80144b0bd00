"""A store that dies in the middle of an upload and returns, one that is slow, one that is full: nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from diffussm.checkpoint import bucket as bucket_module
from diffussm.checkpoint import restore
from diffussm.checkpoint.manifest import MANIFEST, Counters, Manifest
from diffussm.checkpoint.quarantine import NOTE
from diffussm.checkpoint.save import save
from diffussm.checkpoint.snapshot import Part
from diffussm.checkpoint.store import Store, open_store
from diffussm.errors import StorageError
from tests.diffussm.checkpoint import shares
from tests.disks import small_disk
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
    with small_disk(tmp_path / "disk", NUMEL * 4 * 3 // 2) as place:
        yield place


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
    monkeypatch.setattr(bucket_module, "PART_BYTES", 5 << 20)
    return open_store(url)


@pytest.mark.usefixtures("alone")
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


@pytest.mark.usefixtures("alone")
def test_an_upload_goes_on_when_the_server_was_killed_and_returns(
    mortal_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL to the server in the middle of the second upload; it returns when three connections were refused."""
    wire = Wire(mortal_s3.endpoint)
    at = through(wire, mortal_s3.url("killed"), monkeypatch)
    save_step(at, 1)
    refused = threading.Event()
    wire.on_cut, wire.on_refusal = mortal_s3.kill, lambda: wire.refused < 3 or refused.set()

    def revive() -> None:
        assert refused.wait(60)
        mortal_s3.revive()

    nurse = threading.Thread(target=revive)
    nurse.start()
    wire.cut_after = wire._sent + NUMEL * 2
    save_step(at, 2)
    nurse.join()
    wire.close()
    assert wire.cuts == 1
    monkeypatch.setenv("S3_ENDPOINT_URL", mortal_s3.endpoint)
    straight = open_store(mortal_s3.url("killed"))
    assert_holds(straight, 2)
    first = f"checkpoints/{1:012d}"
    manifest = Manifest.from_json(straight.read(f"{first}/{MANIFEST}"), first)
    assert not restore.verify(straight, first, manifest)


@pytest.mark.usefixtures("alone")
def test_a_server_that_stays_away_fails_the_save_by_its_deadline_and_loses_nothing(
    mortal_s3: S3Server,
) -> None:
    at = open_store(mortal_s3.url("away"))
    save_step(at, 1)
    mortal_s3.kill()
    with pytest.raises(StorageError, match=r"could not be written by 1 of 1 ranks .*not stored within 2 s") as failed:
        save_step(at, 2, deadline_s=2.0)
    assert "checkpoint.deadline_s" in failed.value.message
    mortal_s3.revive()
    assert_holds(at, 1)
    save_step(at, 2)
    assert_holds(at, 2)


@pytest.mark.usefixtures("alone")
def test_wrong_credentials_neither_save_nor_restore_nor_begin_anew(
    bucket: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = open_store(bucket[1])
    save_step(right, 1)
    there = list(right.keys())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    wrong = open_store(bucket[1])
    with pytest.raises(StorageError, match=r"rank 0: s3://\S+: .*403.*Forbidden\)\n") as failed:
        save_step(wrong, 2)
    assert "credentials" in failed.value.remedy
    target = [Part("w", (NUMEL,), 0, {"master": torch.zeros(NUMEL)})]
    with pytest.raises(StorageError, match="SignatureDoesNotMatch") as failed:
        restore.restore_newest([wrong], target, pytest.fail, attempt=2)
    assert "credentials" in failed.value.remedy
    assert not target[0].tensors["master"].any()
    assert list(right.keys()) == there
    assert_holds(right, 1)


def flipped(content: bytes) -> bytes:
    return content[:-7] + bytes([content[-7] ^ 4]) + content[-6:]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("damage", "reason"),
    [(lambda b: b[:-9], "bytes of"), (flipped, "has digest"), (lambda b: None, "is missing")],
    ids=["truncated", "flipped", "missing"],
)
def test_damage_in_a_bucket_is_told_and_set_aside(
    bucket: tuple[str, str], damage: Callable[[bytes], bytes | None], reason: str
) -> None:
    at = open_store(bucket[1])
    shares.save_step(at, 1)
    shares.save_step(at, 2)
    key = next(key for key in at.keys(f"checkpoints/{2:012d}/") if key.endswith(".safetensors"))
    content = damage(at.read(key))
    if content is None:
        at.delete(key)
    else:
        at.write(key, content)
    said: list[str] = []
    parts = shares.share(0, 1, step=0)
    found = restore.restore_newest([at], parts, said.append, attempt=2)
    assert found is not None
    assert found.manifest.counters.step == 1
    for part in parts:
        for kind, tensor in part.tensors.items():
            assert torch.equal(tensor, shares.value(part.name, kind, 1))
    (line,) = said
    assert bucket[1] in line
    assert reason in line
    assert "is set aside" in line
    assert at.exists(f"checkpoints/{2:012d}/{NOTE}")


@pytest.mark.usefixtures("alone")
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


@pytest.mark.usefixtures("alone")
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
