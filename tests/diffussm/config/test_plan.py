"""Legal world sizes, held against the partition of the installed streaming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffussm.config import Config, check, plan
from diffussm.config.plan import Batching, Size
from diffussm.config.rules import accumulation, micro_batch
from diffussm.errors import ConfigError


def global_batches(
    batching: Batching, number: int, nodes: int, ranks: int, *, skipped: int = 0, workers: int = 1
) -> list[list[int]]:
    """Sorted positions that all ranks together read in each whole global batch, as streaming deals them out."""
    from streaming.base.partition import get_partitions

    batch, rows = batching.global_batch, batching.canonical_nodes
    share = batch // (nodes * ranks)
    dealt = get_partitions("relaxed", number, rows, nodes, ranks, workers, share, skipped * batch, rows)
    # (nodes, ranks, workers, batches of a worker, share): a loader takes one batch of each worker in turn.
    in_turn = dealt.transpose(3, 2, 0, 1, 4).reshape(-1, batch)
    whole = number // batch - skipped
    return np.sort(in_turn[:whole], axis=1).tolist()


@st.composite
def runs(draw: st.DrawFn) -> tuple[Batching, int, int, int]:
    """(batching, samples, global batches already seen, loader workers)."""
    rows = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
    batch = rows * draw(st.integers(1, 12))
    number = batch * draw(st.integers(2, 5)) + draw(st.integers(0, batch - 1))
    return Batching(batch, 0, rows), number, draw(st.integers(0, number // batch - 1)), draw(st.integers(1, 3))


@settings(max_examples=120, deadline=None)
@given(run=runs(), data=st.data())
def test_every_legal_size_reads_the_same_global_batches(
    run: tuple[Batching, int, int, int], data: st.DataObject
) -> None:
    batching, number, skipped, workers = run
    sizes = [s for ranks in range(1, 9) for s in plan.legal(batching, 64, ranks)]
    expected = global_batches(batching, number, 1, 1)
    read = [position for batch in expected for position in batch]
    assert len(read) == len(set(read)), "a sample is read once in an epoch"
    assert set(read) <= set(range(number))
    for size in data.draw(st.lists(st.sampled_from(sizes), min_size=1, max_size=6)):
        found = global_batches(batching, number, size.nodes, size.ranks_per_node, skipped=skipped, workers=workers)
        assert found == expected[skipped:], size
        assert size.world_size * size.micro_batch * size.accumulation == batching.global_batch


@settings(max_examples=120, deadline=None)
@given(rows=st.sampled_from([4, 6, 8, 9, 16]), factor=st.sampled_from([3, 5, 9, 10, 15]), data=st.data())
def test_sizes_that_are_refused_for_the_order_are_those_that_streaming_refuses(
    rows: int, factor: int, data: st.DataObject
) -> None:
    batching = Batching(rows * factor, 0, rows)
    shapes = [(nodes, ranks) for nodes in range(1, 31) for ranks in range(1, 9) if rows * factor % (nodes * ranks) == 0]
    refused = [shape for shape in shapes if not plan.is_legal(batching, *shape)]
    assume(refused)
    nodes, ranks = data.draw(st.sampled_from(refused))
    with pytest.raises(ValueError, match="not evenly divisible"):
        global_batches(batching, 3 * batching.global_batch + 1, nodes, ranks)
    assert "canonical_nodes" in plan.why_illegal(batching, nodes, ranks)[0]  # type: ignore[index]


def test_canonical_nodes_that_do_not_divide_the_batch_would_repeat_samples() -> None:
    """Why the rule is there: streaming fills a short row with its last sample."""
    batching = Batching(5, 0, 2)
    read = [position for batch in global_batches(batching, 5, 1, 1) for position in batch]
    assert len(set(read)) < len(read)
    assert plan.legal(batching, 8, 1) == []
    assert "data.canonical_nodes: found 2; allowed: a divisor" in plan.why_illegal(batching, 1, 1)[0]  # type: ignore[index]


def test_whole_nodes_with_equally_many_ranks() -> None:
    sizes = plan.legal(Batching(256, 4), 10, 8)
    assert [(s.world_size, s.nodes, s.micro_batch, s.accumulation) for s in sizes] == [
        (8, 1, 4, 8), (16, 2, 4, 4), (32, 4, 4, 2), (64, 8, 4, 1)
    ]  # fmt: skip
    assert str(sizes[1]) == "16 = 2 x 8, 4 images a pass, 4 passes a step"


def test_the_largest_legal_size_uses_whole_nodes_and_part_of_one_only_if_it_must() -> None:
    batching = Batching(256)
    assert plan.largest(batching, 7, 8) == Size(32, 4, 8, 8, 1)
    assert plan.largest(batching, 1, 3) == Size(2, 1, 2, 128, 1)
    assert plan.largest(Batching(6, 0, 3), 2, 5) == Size(3, 1, 3, 2, 1)
    assert plan.largest(batching, 0, 8) is None
    assert plan.largest(Batching(7, 2), 4, 4) is None


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 96), micro=st.integers(0, 8), nodes=st.integers(1, 12), ranks=st.integers(1, 8))
def test_no_legal_size_of_whole_nodes_is_larger(batch: int, micro: int, nodes: int, ranks: int) -> None:
    batching = Batching(batch, micro)
    found = plan.largest(batching, nodes, ranks)
    whole = [n for n in range(1, nodes + 1) if batch % (n * ranks * (micro or 1)) == 0]
    if whole:
        assert found is not None
        assert found.world_size == max(whole) * ranks
    elif micro and batch % micro:
        assert found is None
    else:
        assert found is not None
        assert (found.nodes, found.world_size < ranks) == (1, True)


def test_a_smaller_world_accumulates_what_a_rank_cannot_hold() -> None:
    batching = Batching(96, most_per_pass=10)
    assert plan.size(batching, 1, 12) == Size(12, 1, 12, 8, 1)
    assert plan.size(batching, 1, 4) == Size(4, 1, 4, 8, 3)
    assert plan.size(batching, 1, 3) == Size(3, 1, 3, 8, 4)


@pytest.mark.parametrize(
    ("batching", "nodes", "ranks", "why", "remedy"),
    [
        (
            Batching(256),
            3,
            8,
            "found 24 ranks (3 nodes with 8 each); train.global_batch=256",
            "use 2 nodes with 8 ranks",
        ),
        (Batching(64, 16), 1, 8, "train.micro_batch=16 needs a world size that divides 4", "a multiple of 128"),
        (Batching(12, 5), 1, 1, "train.micro_batch: found 5; allowed: 0 or a divisor", "choose one"),
        (Batching(24, 0, 8), 3, 4, "data.canonical_nodes=8 keeps the order", "use 2 or 4 nodes"),
        (Batching(24), 0, 4, "found 0 nodes", "at least one"),
    ],
)
def test_why_a_size_is_not_legal(batching: Batching, nodes: int, ranks: int, why: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan.size(batching, nodes, ranks)
    assert why in caught.value.message
    assert remedy in caught.value.remedy


def config(tmp_path: Path, **values: int) -> Config:
    cfg = Config(name="a", storage=str(tmp_path))
    cfg.data.latents, cfg.train.images, cfg.train.global_batch = "x", 10_000, 48
    cfg.data.canonical_nodes = values.get("rows", 1)
    cfg.cluster.workers, cfg.cluster.workers_per_node = values["workers"], values.get("each", 0)
    cfg.train.micro_batch = values.get("micro", 0)
    return cfg


def test_a_config_on_whole_nodes(tmp_path: Path) -> None:
    cfg = config(tmp_path, workers=8, each=4)
    check(cfg)
    assert plan.layout(cfg) == (2, 4)
    assert plan.world_sizes(cfg) == [4, 8, 12, 16, 24, 48]
    assert plan.world_sizes(config(tmp_path, workers=4, each=4, micro=3)) == [4, 8, 16]
    with pytest.raises(ConfigError, match=r"cluster\.workers: found 6; allowed with cluster\.workers_per_node=4"):
        check(config(tmp_path, workers=6, each=4))
    with pytest.raises(ConfigError, match=r"cluster\.workers: found 20 ranks .*allowed here: 4, 8, 12, 16, 24, 48"):
        check(config(tmp_path, workers=20, each=4))
    with pytest.raises(ConfigError, match=r"data\.canonical_nodes: found 5"):
        check(config(tmp_path, workers=4, rows=5))
    # Three nodes of two: neither divides sixteen rows, and 32 does not divide 48.
    with pytest.raises(ConfigError, match=r"data\.canonical_nodes=16"):
        check(config(tmp_path, workers=6, each=2, rows=16))


def test_a_config_moves_to_another_size(tmp_path: Path) -> None:
    cfg = config(tmp_path, workers=16, each=4)
    small = plan.resized(cfg, plan.size(Batching.of(cfg, most_per_pass=micro_batch(cfg)), 1, 4))
    check(small)
    assert (small.cluster.workers, small.cluster.workers_per_node) == (4, 4)
    assert (micro_batch(small), accumulation(small)) == (3, 4)
    assert cfg.cluster.workers == 16
    same = plan.resized(cfg, plan.size(Batching.of(cfg), 4, 4))
    assert same == cfg
