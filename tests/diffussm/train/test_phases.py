"""Seconds by phase."""

from __future__ import annotations

from diffussm.train.phases import Phase, Phases


def test_seconds_go_to_the_phase_in_which_they_pass() -> None:
    now = [0.0]
    phases = Phases(lambda: now[0])
    phases.book(Phase.START, 5.0)
    for phase, spent in ((Phase.DATA, 1.0), (Phase.FORWARD, 2.0), (Phase.BACKWARD, 4.0), (Phase.DATA, 8.0)):
        phases.enter(phase)
        now[0] += spent
    found = phases.seconds()
    assert {phase: spent for phase, spent in found.items() if spent} == {
        Phase.START: 5.0, Phase.DATA: 9.0, Phase.FORWARD: 2.0, Phase.BACKWARD: 4.0,
    }  # fmt: skip
    assert sum(found.values()) == 5.0 + now[0]


def test_a_beat_tells_where_and_how_far() -> None:
    now = [0.0]
    phases = Phases(lambda: now[0])
    phases.enter(Phase.FORWARD)
    phases.completed(16)
    now[0] = 3.0
    beat = phases.beat()
    assert (beat.phase, beat.for_s, beat.steps, beat.images, beat.own_s) == (Phase.FORWARD, 3.0, 1, 16, 3.0)
