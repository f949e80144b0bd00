from __future__ import annotations

import torch

from diffussm.bench.machine import Side, describe, free_bytes, interleave, paired_ratios

CPU = torch.device("cpu")


def test_sides_take_turns_and_the_warm_up_is_not_counted() -> None:
    order: list[str] = []
    sides = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, device=CPU)
    assert order == ["a", "b"] * 4
    assert [(side.name, len(side.seconds)) for side in sides] == [("a", 3), ("b", 3)]


def test_ratios_are_taken_round_by_round() -> None:
    slow, fast = Side("slow", (4.0, 9.0, 2.0)), Side("fast", (2.0, 3.0, 2.0))
    assert list(paired_ratios(slow, fast)) == [1.0, 2.0, 3.0]
    assert slow.median == 4.0


def test_the_machine_is_named() -> None:
    assert f"torch {torch.__version__}" in describe(CPU)


def test_free_memory_is_less_than_all() -> None:
    assert 2**20 < free_bytes() < 2**50
