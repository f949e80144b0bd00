from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from diffussm.observe.log import Narrator

PROGRESS = {
    "kind": "progress", "images": 72, "total": 72, "loss": 1.5, "grad_norm": 1.0, "lr": 1e-4, "images_per_s": 5.0,
    "eta_s": 0.0,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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
    narrator.hear(PROGRESS | {"loss": None, "nonfinite_steps": 3})
    narrator.hear({"kind": "event", "event": "saved", "attempt": 1, "images": 64})
    text = stream.getvalue()
    assert "loss not finite" in text
    assert "checkpoint none yet" in text
    assert "skipped steps 3" in text
    assert "saved: images 64" in text


def test_a_file_gets_dated_lines_while_a_terminal_shows_a_panel() -> None:
    stream, now, kept = Terminal(), [0.0], list[str]()
    narrator = Narrator(stream, clock=lambda: now[0], name="my-run")
    narrator.log = kept.append
    for images in range(8, 73, 8):
        now[0] += 2.0
        narrator.hear(PROGRESS | {"images": images})
    narrator.say("between")
    narrator.end()
    assert len(kept) == 4  # at 2, 12 and 16 s, the last image among them, and what was said
    assert kept[-1].endswith("between")
    assert kept[0][:2] == "20"
    assert "\x1b" not in "".join(kept)
    assert "my-run" in stream.getvalue()


def hear_much(stream: Any) -> list[str]:
    """What the log has after three records and a line; the narrator must come back from each."""
    kept: list[str] = []
    narrator = Narrator(stream)
    narrator.log = kept.append
    narrator.hear(PROGRESS)
    narrator.hear({"kind": "event", "event": "saved", "attempt": 1, "images": 64})
    narrator.hear({"kind": "event", "event": "hang", "reason": "rank 3"})
    narrator.say("the end")
    narrator.end()
    return [line.split(" ", 2)[2] for line in kept]


def test_a_closed_standard_error_ends_nothing_and_the_log_has_it_all() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        kept = hear_much(stream)
    heads = [line.split(":")[0] for line in kept if not line.startswith("train")]
    assert heads[:4] == ["standard error does not show everything", "saved", "hang", "the end"]
    assert heads[4:] == ["standard error has not shown 4 lines and drawings so far"]
    assert "BrokenPipeError" in kept[1]


def test_a_full_disk_under_standard_error_ends_nothing() -> None:
    with Path("/dev/full").open("w") as stream:
        kept = hear_much(stream)
    assert "No space left" in kept[1]
    assert "the end" in kept


PAUSED = """
import os, time
from diffussm.observe import screen
from diffussm.observe.log import Narrator
from tests.diffussm.observe.test_log import PROGRESS
screen.PATIENCE_S = 0.2
reader, writer = os.pipe()
os.dup2(writer, 2)
os.set_blocking(2, False)
try:
    while True:
        os.write(2, b"x" * 4096)
except BlockingIOError:
    os.set_blocking(2, True)
kept, narrator = [], Narrator(name="r")
narrator.log = kept.append
began = time.monotonic()
for number in range(2000):
    narrator.hear({"kind": "event", "event": "saved", "images": number})
assert time.monotonic() - began < 30, "waited for each line"
assert len(kept) == 2001, len(kept)
assert any("does not take" in line for line in kept)
print("came back")
"""


def test_a_paused_terminal_holds_up_neither_the_caller_nor_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", PAUSED], capture_output=True, text=True, timeout=120)
    assert done.stdout == "came back\n", done.stderr
    assert done.returncode == 0
