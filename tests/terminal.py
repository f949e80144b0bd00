"""A real terminal for a child process: a pty of a size, and a screen that holds what a person would see."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator

import pyte


class Terminal:
    """Runs Python code on a pty. `screens` yields the lines that are visible each time the child has written."""

    def __init__(self, code: str, *, columns: int = 100, rows: int = 24) -> None:
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        settings = termios.tcgetattr(theirs)
        settings[3] &= ~termios.ECHO  # what `type` writes is for the child alone
        termios.tcsetattr(theirs, termios.TCSANOW, settings)
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
            env=environment | {"TERM": "xterm-256color"}, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self._ours = ours

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._ours, text.encode())

    def screens(self) -> Iterator[list[str]]:
        """What is visible after each piece of output, to the end of the child."""
        while True:
            try:
                data = os.read(self._ours, 1 << 16)
            except OSError:  # how Linux says that the other end is closed
                data = b""
            if not data:
                break
            self._stream.feed(data)
            yield [line.rstrip() for line in self.screen.display]
        os.close(self._ours)
        self.child.wait(60)
