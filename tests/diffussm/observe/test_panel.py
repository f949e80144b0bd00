"""The panel of a training: what it knows, how it is drawn, and what a real terminal shows of it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from diffussm.observe.panel import BARS, Known, curve, draw, values
from tests.terminal import Terminal

PROGRESS: dict[str, Any] = {
    "kind": "progress", "images": 25_600, "total": 102_400, "loss": 0.1234, "grad_norm": 0.5, "lr": 1e-4,
    "images_per_s": 812.3, "eta_s": 95.0, "mfu": 0.312, "macs_per_s": 2.5e12, "nonfinite_steps": 0, "attempt": 2,
}  # fmt: skip
STORY: list[dict[str, Any]] = [
    {"kind": "event", "event": "resumed", "images": 12_800, "world_size": 8, "attempt": 2},
    *({"kind": "progress"} | PROGRESS | {"images": 12_800 + 1_280 * i, "loss": 0.3 / i} for i in range(1, 10)),
    {"kind": "event", "event": "saved", "images": 24_320, "tier": "storage", "checkpoint": "c"},
    {"kind": "event", "event": "saved", "images": 25_600, "tier": "local", "checkpoint": "c"},
    {"kind": "event", "event": "failure", "cause": "worker", "decision": "retry", "reason": "rank 3 was killed"},
    PROGRESS,
]


def told(story: list[dict[str, Any]]) -> Known:
    known = Known("imagenet-256")
    for now, record in enumerate(story):
        known = known.hear(record, float(now))
    return known


def test_everything_that_a_person_asks_is_there() -> None:
    assert values(told(STORY), now=70.0) == {
        "images": "25,600 / 102,400",
        "images/s": "812.3",
        "MFU": "31.2%  2.5 TMAC/s",
        "loss": "0.1234",
        "grad norm": "0.5",
        "lr": "0.0001",
        "ETA": "1:35",
        "checkpoint": "24,320  1:00 ago",
        "workers": "8  start 2",
        "faults": "1  last: worker",
    }


def test_what_is_not_known_yet_or_not_finite_is_said_so() -> None:
    said = values(Known("x"), now=0.0)
    assert (said["ETA"], said["workers"], said["loss"], said["checkpoint"]) == ("?", "?", "?", "none yet")
    said = values(told([PROGRESS | {"loss": None, "nonfinite_steps": 3}]), now=0.0)
    assert said["loss"] == "not finite"
    assert said["faults"] == "0  skipped steps 3"


def test_losses_become_a_row_of_bars() -> None:
    assert curve((3.0, 1.0, 2.0)) == BARS[7] + BARS[0] + BARS[4]
    assert curve((1.0, 1.0)) == BARS[0] * 2
    many = told([PROGRESS | {"loss": float(i)} for i in range(500)])
    assert len(many.losses) < 500


@pytest.mark.parametrize("width", [40, 60, 76, 120])
def test_it_fits_every_width(width: int) -> None:
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=False).print(draw(told(STORY), 70.0, width))
    lines = stream.getvalue().splitlines()
    assert {len(line) for line in lines} == {width}
    assert len(lines) <= 10
    assert "812.3" in stream.getvalue()


CHILD = """
import time
from diffussm.observe.log import Narrator
from tests.diffussm.observe.test_panel import STORY
narrator = Narrator(name="imagenet-256")
for record in STORY:
    narrator.hear(record)
    narrator._screen.refresh()
input()
narrator.end()
print("the end")
"""


def test_a_real_terminal_shows_one_panel_below_the_lines_and_takes_it_down() -> None:
    terminal = Terminal(CHILD, columns=100, rows=24)
    seen: list[str] = []
    for lines in terminal.screens():
        seen = lines
        shown = " ".join("".join(lines).split())
        if "faults 1 last: worker" in shown and "25,600 / 102,400" in shown:
            terminal.type("\n")
            break
    tops = [i for i, line in enumerate(seen) if line.startswith("╭")]
    assert len(tops) == 1  # redrawn in place: there is one, not one for each record
    assert [line.split(":")[0] for line in seen[: tops[0]]] == ["resumed", "saved", "saved", "failure"]
    body = " ".join(" ".join(seen[tops[0] :]).split())
    for part in ("imagenet-256", "25%", "images/s 812.3", "MFU 31.2% 2.5 TMAC/s", "loss 0.1234", "ETA 1:35", "start 2"):
        assert part in body
    for lines in terminal.screens():
        seen = lines
    assert not any(line.startswith("╭") for line in seen)
    assert "the end" in seen
    assert terminal.child.returncode == 0


def test_a_start_knows_what_it_went_on_from() -> None:
    resumed = {"kind": "event", "event": "resumed", "images": 40, "world_size": 2, "attempt": 2}
    saved = {"kind": "event", "event": "saved", "images": 40, "tier": "storage"}
    assert values(told([resumed]), now=9.0)["checkpoint"] == "40  went on from it"
    assert values(told([saved, resumed]), now=9.0)["checkpoint"] == "40  0:09 ago"  # this driver saw the save
    back = values(told([saved | {"images": 48}, resumed]), now=9.0)["checkpoint"]
    assert back == "40  went on from it"  # the newer one was refused


def test_a_group_that_was_asked_to_leave_is_no_fault() -> None:
    asked = {"kind": "event", "event": "failure", "cause": "regroup", "decision": "grow", "reason": "2 could be had"}
    assert values(told([asked]), now=0.0)["faults"] == "0"
