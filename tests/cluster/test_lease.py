from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.lease import claim_attempt, next_attempt
from diffussm.checkpoint.store import LocalStore
from diffussm.config.schema import Config
from diffussm.errors import StorageError
from diffussm.train.world import current


def test_numbers_rise_and_leave_a_record(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    assert [next_attempt(store, 2) for _ in range(3)] == [1, 2, 3]
    assert json.loads(store.read("attempts/2/start.json"))["world_size"] == 2


def test_starts_at_the_same_moment_get_different_numbers(tmp_path: Path) -> None:
    claimed: list[int] = []
    gate = threading.Barrier(8)

    def start() -> None:
        gate.wait()
        claimed.append(next_attempt(LocalStore(str(tmp_path)), 1))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(1, 9))


@pytest.mark.world_size(2)
def test_all_ranks_share_one_number_or_one_error(tmp_path: Path) -> None:
    world = current(torch.device("cpu"))
    assert claim_attempt(Config(name="r", storage=str(tmp_path)), world) == 1
    dist.barrier()
    assert claim_attempt(Config(name="r", storage=str(tmp_path)), world) == 2
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        claim_attempt(Config(name="r", storage=str(tmp_path / "file")), world)
