from __future__ import annotations

import threading
from pathlib import Path

import pytest

from diffussm.checkpoint.fence import Fence, record
from diffussm.checkpoint.store import LocalStore
from diffussm.errors import ExitCode, StorageError, Superseded


def test_only_the_newest_attempt_passes(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.write(record(1), b"{}")
    first = Fence(store, 1)
    first.check()
    store.write(record(2), b"{}")
    first.raise_if_lost()  # nobody has looked yet
    with pytest.raises(Superseded, match="attempt 2 has begun; attempt 1") as refusal:
        first.check()
    assert refusal.value.code is ExitCode.SUPERSEDED
    with pytest.raises(Superseded):
        first.raise_if_lost()
    Fence(store, 2).check()


def test_the_watch_finds_out_and_a_dumb_store_proves_nothing(tmp_path: Path) -> None:
    looked = threading.Event()

    class Dumb(LocalStore):
        silent = True

        def size(self, key: str) -> int:
            if self.silent:
                looked.set()
                raise StorageError("no answer")
            return super().size(key)

    store = Dumb(str(tmp_path))
    fence = Fence(store, 1)
    fence.watch(0.01)
    assert looked.wait(10)
    fence.raise_if_lost()
    store.write(record(2), b"{}")
    store.silent = False
    assert fence._thread is not None
    fence._thread.join(10)
    with pytest.raises(Superseded):
        fence.raise_if_lost()
    fence.close()
