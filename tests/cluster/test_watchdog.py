"""Judgements on heartbeats."""

from __future__ import annotations

import pytest

from cluster.watchdog import Patience, Seen, judge, stragglers
from diffussm.train.phases import Beat, Phase

PATIENCE = Patience(step_s=10, start_s=100, interval_s=0.5)


def seen(phase: Phase, for_s: float, steps: int = 5, age_s: float = 0.3) -> Seen:
    return Seen(Beat(phase, for_s, steps, steps * 8, 1.0), age_s)


def test_a_group_that_works_is_left_alone() -> None:
    assert judge({}, PATIENCE) is None
    assert judge({0: seen(Phase.DATA, 9), 1: seen(Phase.BACKWARD, 9)}, PATIENCE) is None
    assert judge({0: seen(Phase.START, 50, steps=0), 1: seen(Phase.RESTORE, 50, steps=0)}, PATIENCE) is None
    assert judge({0: seen(Phase.SAVE, 50)}, PATIENCE) is None
    assert judge({0: seen(Phase.FORWARD, 50, steps=0)}, PATIENCE) is None, "the first step compiles"
    assert judge({0: seen(Phase.END, 500, age_s=500)}, PATIENCE) is None


@pytest.mark.parametrize("phase", [Phase.DATA, Phase.FORWARD, Phase.BACKWARD])
def test_the_rank_that_is_behind_is_guilty_and_its_phase_named(phase: Phase) -> None:
    verdict = judge({0: seen(Phase.REDUCE, 20), 1: seen(phase, 21), 2: seen(Phase.REDUCE, 20)}, PATIENCE)
    assert verdict is not None
    assert (verdict.rank, verdict.phase, verdict.silent) == (1, phase, False)
    assert f"rank 1 stands in {phase.value} after 5 steps" in verdict.said
    assert "rank 0 in reduce" in verdict.said


def test_fewer_steps_are_further_behind_than_an_earlier_phase() -> None:
    verdict = judge({0: seen(Phase.DATA, 20, steps=6), 1: seen(Phase.REDUCE, 20, steps=5)}, PATIENCE)
    assert verdict is not None
    assert verdict.rank == 1


def test_a_silent_rank_is_guilty_whatever_its_last_phase_was() -> None:
    verdict = judge({0: seen(Phase.FORWARD, 11), 1: seen(Phase.REDUCE, 0.1, age_s=11)}, PATIENCE)
    assert verdict is not None
    assert (verdict.rank, verdict.silent) == (1, True)
    assert "no sign of life" in verdict.said


def test_a_start_has_an_end_too() -> None:
    verdict = judge({0: seen(Phase.RESTORE, 101, steps=0)}, PATIENCE)
    assert verdict is not None
    assert verdict.phase is Phase.RESTORE


def test_a_straggler_is_measured_against_the_median() -> None:
    beats = {rank: Beat(Phase.DATA, 0, 10, 80, own_s) for rank, own_s in enumerate((1.0, 1.0, 3.0))}
    assert stragglers(beats) == pytest.approx({0: 1, 1: 1, 2: 3})
    assert stragglers({}) == {}
    assert stragglers({0: Beat(Phase.START, 0, 0, 0, 0.0)}) == {}
