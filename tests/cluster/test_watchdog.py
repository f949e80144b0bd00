"""Judgements on heartbeats."""

from __future__ import annotations

import pytest

from cluster.watchdog import Patience, Seen, Stragglers, judge, own_seconds, scores
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


def test_a_rank_that_failed_and_tidies_up_is_what_the_others_wait_for() -> None:
    verdict = judge({0: seen(Phase.REDUCE, 20), 1: seen(Phase.END, 19)}, PATIENCE)
    assert verdict is not None
    assert (verdict.rank, verdict.phase) == (1, Phase.END)
    assert "rank 1 stands in end after 5 steps, for 19.3 s (rank 0 in reduce)" in verdict.said
    saving = judge({0: seen(Phase.SAVE, 200), 1: seen(Phase.END, 19)}, PATIENCE)
    assert saving is not None
    assert saving.rank == 0, "both did the last step, and one cannot save it"


def test_a_start_has_an_end_too() -> None:
    verdict = judge({0: seen(Phase.RESTORE, 101, steps=0)}, PATIENCE)
    assert verdict is not None
    assert verdict.phase is Phase.RESTORE


def beats(steps: int, *own_s: float) -> dict[int, Beat]:
    return {rank: Beat(Phase.DATA, 0, steps, steps * 8, seconds) for rank, seconds in enumerate(own_s)}


def test_a_straggler_is_measured_against_the_median() -> None:
    own = own_seconds(beats(10, 5, 5, 5), beats(20, 6, 6, 8))
    assert own == pytest.approx({0: 0.1, 1: 0.1, 2: 0.3})
    assert scores(own) == pytest.approx({0: 1, 1: 1, 2: 3})
    assert scores({0: 0.1, 1: 0.2}) == pytest.approx({0: 1, 1: 2}), "of two the faster is the measure"
    assert scores({0: 0.1, 1: 0.3, 2: 0.1, 3: 0.3}) == pytest.approx({0: 1, 1: 3, 2: 1, 3: 3})
    assert scores({0: 0.0, 1: 0.0}) == {}


def windows(*own: tuple[float, float], wait_s: float = 0.0) -> list[dict[int, float]]:
    """What is said after each window of 20 steps in which the two ranks took such own seconds a step."""
    watch, steps, now, sums = Stragglers(steps=20, seconds=30), 1, 0.0, [9.0, 1.0]
    assert watch.look(1, beats(0, 0, 0), now) == {}
    assert watch.look(1, beats(steps, *sums), now) == {}, "the first step compiles"
    said = []
    for each in own:
        steps, now = steps + 20, now + 20 * (max(each) + wait_s)
        sums = [total + 20 * seconds for total, seconds in zip(sums, each, strict=True)]
        said.append(watch.look(1, beats(steps, *sums), now))
    return said


def test_a_rank_that_slows_down_late_is_told_once_until_it_has_recovered() -> None:
    well, slow, border = (2.0, 2.0), (6.0, 2.0), (2.8, 2.0)
    assert windows(well, well, slow, slow, border, slow, well, slow) == [
        {}, {}, {0: pytest.approx(3)}, {}, {}, {}, {}, {0: pytest.approx(3)},
    ]  # fmt: skip
    assert windows((0.003, 0.009), wait_s=2) == [{}], "milliseconds of a step of two seconds"


def test_a_window_is_long_enough_and_of_one_start() -> None:
    watch = Stragglers(steps=20, seconds=30)
    assert watch.look(1, {}, 0) == {}
    assert watch.look(1, beats(1, 1, 1), 0) == {}
    assert watch.look(1, beats(10, 100, 10), 110) == {}, "too few steps"
    assert watch.look(1, beats(100, 29, 1), 29) == {}, "too few seconds"
    assert watch.look(2, beats(30, 1, 90), 300) == {}, "another start has its own windows"
    assert watch.look(2, beats(60, 2, 180), 400) == pytest.approx({1: 90})
