"""Who reads: variables against the process group, and what ranks agree on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from diffussm.data import ranks
from diffussm.data.cursor import Batch
from diffussm.data.ranks import Ranks
from diffussm.errors import DataError, MissingError, StorageError


class TestWorld:
    @pytest.fixture(autouse=True)
    def _clean(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)

    def set(self, monkeypatch: pytest.MonkeyPatch, values: str, rank: int, size: int) -> None:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        for name, value in zip(names, values.split(), strict=True):
            if value != "-":
                monkeypatch.setenv(name, value)
        monkeypatch.setattr(dist, "is_initialized", lambda: size > 1)
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: size)

    def test_one_process_needs_no_variables(self) -> None:
        assert ranks.current() == Ranks(0, 1, 1)

    def test_size_and_first_rank_of_the_node(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.set(monkeypatch, "5 6 1 2", 5, 6)
        found = ranks.current()
        assert found == Ranks(5, 6, 2)
        assert (found.nodes, found.leader) == (3, 4)

    @pytest.mark.parametrize(
        ("values", "rank", "size"),
        [
            ("- - - -", 1, 2),
            ("1 2 1 -", 1, 2),
            ("0 2 0 2", 1, 2),
            ("1 2 1 2", 0, 1),
            ("1 3 1 2", 1, 3),
            ("1 4 0 2", 1, 4),
        ],
    )
    def test_contradictions_are_refused(
        self, monkeypatch: pytest.MonkeyPatch, values: str, rank: int, size: int
    ) -> None:
        self.set(monkeypatch, values, rank, size)
        with pytest.raises(MissingError, match="environment"):
            ranks.current()


def batch(ids: list[int]) -> Batch:
    nothing = torch.zeros(len(ids), 1)
    return Batch(torch.tensor(ids), torch.zeros(len(ids)), nothing, nothing, nothing, nothing)


def test_doubled_samples_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for other, doubled in (([3, 4, 5], False), ([2, 3, 4], True)):

        def gather(everyone: list[Any], mine: list[int], other: list[int] = other) -> None:
            everyone[:] = [mine, other]

        monkeypatch.setattr(dist, "all_gather_object", gather)
        if doubled:
            with pytest.raises(DataError, match="1 of 6 samples of a batch are doubled"):
                ranks.check_disjoint(batch([0, 1, 2]))
        else:
            ranks.check_disjoint(batch([0, 1, 2]))


@pytest.mark.world_size(2)
def test_a_leaders_failure_is_raised_on_every_rank() -> None:
    me = Ranks(dist.get_rank(), 2, 2)
    assert ranks.everyone(me.rank) == [0, 1]
    assert ranks.by_leader(me, lambda: f"made by {me.rank}") == "made by 0"

    def fails() -> str:
        raise StorageError("no store")

    with pytest.raises(StorageError, match="no store"):
        ranks.by_leader(me, fails)
