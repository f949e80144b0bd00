"""Evidence of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.stacks import end, look, state_of

STUCK = """
import faulthandler, signal, sys, time
file = open(sys.argv[1], "w+")
faulthandler.register(signal.SIGUSR2, file, all_threads=True)
def stuck_here():
    print("ready", flush=True)
    time.sleep(600)
stuck_here()
"""


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(tmp_path / "stacks")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_stack_of_a_stuck_process_says_where(stuck: subprocess.Popen[str], tmp_path: Path) -> None:
    file = str(tmp_path / "stacks")
    found = look({1: (stuck.pid, file)})[1]
    assert "stuck_here" in found["stacks"]
    assert found["state"] in ("asleep", "running")
    assert look({1: (stuck.pid, file)})[1]["stacks"].count("stuck_here") == 1, "only what is new"


def test_a_stopped_process_is_named_and_not_asked(stuck: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(stuck.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while state_of(stuck.pid) != "stopped" and time.monotonic() < deadline:
        time.sleep(0.01)
    found = look({0: (stuck.pid, str(tmp_path / "stacks"))})[0]
    assert found["state"] == "stopped"
    assert "stacks" not in found
    end([stuck.pid])
    assert stuck.wait(10) == -signal.SIGKILL


def test_a_process_that_is_gone_is_no_error(stuck: subprocess.Popen[str], tmp_path: Path) -> None:
    stuck.kill()
    stuck.wait()
    assert look({0: (stuck.pid, str(tmp_path / "none"))})[0]["state"] == ""
    end([stuck.pid])
