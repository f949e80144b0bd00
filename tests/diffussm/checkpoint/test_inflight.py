"""What follows a save on its thread: deletion only after the new one was read back, and tried again when it fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffussm.checkpoint import restore
from diffussm.checkpoint.fence import Fence
from diffussm.checkpoint.inflight import InFlight
from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.save import Order, draft
from diffussm.checkpoint.snapshot import Part, Snapshot
from diffussm.checkpoint.source import Source
from diffussm.checkpoint.store import LocalStore
from diffussm.checkpoint.tier import Tier
from diffussm.errors import DataError, StorageError

pytestmark = pytest.mark.usefixtures("alone")


class Fragile(LocalStore):
    """A folder that refuses deletions, loses the last byte of what is put, or hangs in a verb, when told to."""

    refuses_deletion = loses_bytes = False
    hangs_in = ""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.hangs, self.returns = threading.Event(), threading.Event()

    def _hang(self, verb: str) -> None:
        if verb == self.hangs_in:
            self.hangs.set()
            self.returns.wait()

    def read_range(self, key: str, start: int, size: int) -> bytes:
        self._hang("read_range")
        return super().read_range(key, start, size)

    def delete(self, key: str) -> None:
        self._hang("delete")
        if self.refuses_deletion:
            raise StorageError(f"{key}: permission denied")
        super().delete(key)

    def put(self, source: Source, key: str) -> None:
        self._hang("put")
        super().put(source, key)
        if self.loses_bytes:
            path = self.root / key
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def begin(
    store: LocalStore, step: int, said: list[tuple[str, dict[str, Any]]], *,
    permanent: bool = False, first: Callable[[float], object] | None = None,
) -> InFlight:  # fmt: skip
    snapshot, at = Snapshot(), Counters(step, step, 0, step, step, 0)
    snapshot.take([Part("w", (5,), 0, {"master": torch.full((5,), float(step))})])
    plan = draft(at, {"w": (5,)}, ["master"], attempt=1, zero_stage=1, config_digest="d", permanent=permanent)
    folder, tier = f"checkpoints/{step:012d}", Tier("storage", store, 1, 0, keep=1)
    order = Order(store, folder, plan, snapshot.source(), 60.0, Fence(store, 1), first=first)
    return InFlight(order, snapshot, tier, 0.0, lambda what, **details: said.append((what, details)))


def save(store: LocalStore, step: int, said: list[tuple[str, dict[str, Any]]], **more: Any) -> InFlight:
    flight = begin(store, step, said, **more)
    flight.wait(60)
    assert flight.done
    return flight


def there(store: LocalStore) -> list[int]:
    return [int(folder.rpartition("/")[2]) for folder, _ in restore.manifests(store)]


def test_a_deletion_that_fails_is_told_and_tried_again_after_the_next_save(tmp_path: Path) -> None:
    store, said = Fragile(str(tmp_path)), list[tuple[str, dict[str, Any]]]()
    save(store, 1, said)
    store.refuses_deletion = True
    assert save(store, 2, said).error is None
    assert said[-1] == (
        "delete failed",
        {"checkpoint": f"checkpoints/{2:012d}", "reason": f"checkpoints/{1:012d}/manifest.json: permission denied"},
    )
    assert there(store) == [2, 1]
    store.refuses_deletion = False
    save(store, 3, said)
    assert there(store) == [3]
    assert len(list(store.keys())) == 2, "nothing of the older ones is left"
    assert [what for what, _ in said] == ["saved", "saved", "delete failed", "saved"]


def test_nothing_is_deleted_before_the_new_one_was_read_back(tmp_path: Path) -> None:
    store, said = Fragile(str(tmp_path)), list[tuple[str, dict[str, Any]]]()
    save(store, 1, said)
    store.loses_bytes = True
    assert isinstance(save(store, 2, said).error, DataError)
    what, details = said[-1]
    assert what == "save failed"
    assert "reads back differently" in details["reason"]
    assert there(store) == [1]
    target = Part("w", (5,), 0, {"master": torch.zeros(5)})
    assert restore.restore_newest([store], [target], pytest.fail, attempt=2) is not None
    assert target.tensors["master"].tolist() == [1.0] * 5


def test_what_must_not_be_lost_is_stored_before_the_manifest(tmp_path: Path) -> None:
    """Whatever comes of it: a diary holds up no checkpoint."""
    store, asked = Fragile(str(tmp_path)), list[tuple[bool, float]]()

    def first(seconds: float) -> bool:
        asked.append((store.exists(f"checkpoints/{1:012d}/manifest.json"), seconds))
        return False

    assert save(store, 1, [], first=first).error is None
    ((there_already, seconds),) = asked
    assert not there_already
    assert 0 < seconds <= 10
    assert there(store) == [1]


def test_milestones_outlive_the_rest(tmp_path: Path) -> None:
    store, said = Fragile(str(tmp_path)), list[tuple[str, dict[str, Any]]]()
    for step in (1, 2, 3, 4):
        save(store, step, said, permanent=step == 2)
    assert there(store) == [4, 2]


@pytest.mark.parametrize(("verb", "stored"), [("put", False), ("read_range", True), ("delete", True)])
def test_a_save_that_is_given_up_ends_even_while_the_store_hangs(tmp_path: Path, verb: str, stored: bool) -> None:
    """The notice before a preemption is shorter than a store's own patience. What is stored by then counts."""
    store, said = Fragile(str(tmp_path)), list[tuple[str, dict[str, Any]]]()
    save(store, 1, said)
    store.hangs_in = verb
    flight = begin(store, 2, said)
    assert store.hangs.wait(30)
    assert not flight.done
    flight.cancel()
    flight.wait(30)
    assert flight.done
    assert there(store) == ([2, 1] if stored else [1]), "nothing is deleted that was not read back"
    assert [what for what, _ in said] == ["saved", "saved" if stored else "save failed"]
    assert (flight.error is None) == stored
    store.hangs_in = ""
    store.returns.set()
