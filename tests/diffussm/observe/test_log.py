from __future__ import annotations

import io

import pytest

from diffussm.observe.log import Narrator, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3723, "1:02:03"), (float("inf"), "?")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_log_gets_plain_lines_with_rate_and_eta_not_too_many() -> None:
    stream, now = io.StringIO(), [0.0]
    narrator = Narrator(stream, clock=lambda: now[0])
    for done in range(0, 101):
        now[0] = done / 10
        narrator.work("encode", done, 100, "images")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "encode  0/100 images  0.0 images/s  ETA ?" in lines[0]
    assert "encode  100/100 images  10.0 images/s  ETA 0:00" in lines[1]
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    narrator = Narrator(stream)
    narrator.work("encode", 1, 4, "images")
    narrator.work("encode", 2, 4, "images")
    narrator.end()
    assert "2/4 images" in stream.getvalue()


def test_workers_are_heard() -> None:
    stream = io.StringIO()
    narrator = Narrator(stream)
    progress = {
        "kind": "progress",
        "images": 64,
        "total": 64,
        "loss": None,
        "grad_norm": 1.0,
        "lr": 1e-4,
        "images_per_s": 5.0,
    }
    narrator.hear(progress | {"nonfinite_steps": 3})
    narrator.hear({"kind": "event", "event": "saved", "attempt": 1, "images": 64})
    text = stream.getvalue()
    assert "loss not finite" in text
    assert "non-finite steps 3" in text
    assert "saved: images 64" in text
