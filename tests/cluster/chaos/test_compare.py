"""Comparisons of two runs' metrics."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.chaos.compare import Made, Recovery, compare, recovery, table


def line(
    images: int, loss: float | None = 1.0, samples: str = "a", time: float = 0.0, attempt: int = 1
) -> dict[str, Any]:
    return {"images": images, "loss": loss, "samples": f"{samples}{images}", "time": time, "attempt": attempt}


CALM = [line(8), line(16), line(24)]


def test_the_same_lines_are_identical_and_of_replayed_ones_the_last_counts() -> None:
    assert compare(CALM, CALM).bit_equal
    assert compare(CALM, [line(8), line(16, 7.0), line(16), line(24)]).bit_equal
    assert compare([line(8, None)], [line(8, None)]).bit_equal


@pytest.mark.parametrize(
    ("faulty", "word"),
    [
        ([line(8), line(16)], "1 are missing"),
        ([line(8), line(16, samples="b"), line(24)], "1 have other samples"),
        ([line(8), line(16, 1.01), line(24)], "losses differ by 1.0e-02"),
        ([line(8), line(16, None), line(24)], "losses differ by inf"),
        ([], "3 are missing"),
    ],
)
def test_any_difference_is_told(faulty: list[dict[str, Any]], word: str) -> None:
    result = compare(CALM, faulty)
    assert not result.equal
    assert word in str(result)


def test_a_rounding_is_no_difference_but_is_told() -> None:
    result = compare(CALM, [line(8), line(16, 1.000001), line(24)])
    assert result.equal
    assert not result.bit_equal
    assert "within 1.0e-06" in str(result)


def test_nothing_is_not_identical_to_nothing() -> None:
    assert not compare([], []).equal


def test_recovery_is_counted_to_the_first_step_of_a_later_start() -> None:
    records = [line(8, time=1), line(16, time=2), line(24, time=3), line(32, time=4.2)]
    records += [line(24, time=20, attempt=2), line(32, time=21, attempt=2), line(40, time=22, attempt=2)]
    assert recovery(Made("kill-rank", 4.0, 24, 1), records) == Recovery(16.0, 16)
    assert recovery(Made("stop-rank", 20.5, 24, 2), records) == Recovery(0.5, 0), "the run went on"
    assert recovery(Made("kill-rank", 30.0, 40, 2), records) is None


def test_a_start_that_another_fault_ended_later_is_not_this_faults_recovery() -> None:
    records = [line(8, time=1), line(16, time=2), line(24, time=3), line(24, time=30, attempt=2)]
    slowed, killed = Made("slow-store", 1.5, 8, 1), Made("kill-rank", 2.5, 16, 1)
    assert recovery(slowed, records, [slowed, killed]) == Recovery(0.5, 0)
    assert recovery(killed, records, [slowed, killed]) == Recovery(27.5, 8)
    lost = [each for each in records if each["images"] < 24 or each["attempt"] == 2]
    assert recovery(Made("stop-rank", 0.9, 0, 1), lost, [killed]) == Recovery(pytest.approx(0.1), 0), (
        "lines may be lost"
    )


def test_a_kill_is_recovered_from_by_a_restart_though_another_fault_followed() -> None:
    records = [line(8, time=1), line(16, time=2.1), line(16, time=30, attempt=2)]
    first, second = Made("kill-rank", 2.0, 8, 1), Made("kill-rank", 2.05, 8, 1)
    assert recovery(first, records, [first, second]) == Recovery(28.0, 8)


def test_the_table_counts_what_was_survived_and_how() -> None:
    records = [line(8, time=1), line(16, time=2), line(16, time=11, attempt=2), line(24, time=12, attempt=2)]
    made = [Made("kill-rank", 2.0, 8, 1), Made("kill-rank", 12.0, 24, 2), Made("stop-rank", 11.5, 16, 2)]
    text = table(made, records, 64, compare(CALM, records))
    assert "| kill-rank | 1 of 2 | 9.0 s | 9.0 s | 1 (8) | 1 (8) | bit for bit |" in text
    assert "| stop-rank | 1 of 1 | 0.5 s | 0.5 s | 0 (0) | 0 (0) | bit for bit |" in text
    assert "| all | 2 of 3 | 4.8 s | 9.0 s | 0 (4) | 1 (8) | bit for bit |" in text
    assert "reached 24 of 64 images" in text


@pytest.mark.parametrize(("loss", "word"), [(1.0, "bit for bit"), (1.00001, "to 1e-05"), (2.0, "NO")])
def test_the_table_says_whether_the_result_was_identical(loss: float, word: str) -> None:
    records = [line(8, time=1), line(16, time=2), line(24, loss, time=3)]
    made = [Made("stop-rank", 1.5, 8, 1)]
    assert f"| {word} |" in table(made, records, 24, compare(CALM, records))
    assert "| - |" in table(made, records, 24)
