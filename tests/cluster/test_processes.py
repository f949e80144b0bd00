"""Real processes, told apart by when they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from cluster.processes import Process, children_of, kill_tree, parent_of

FROM_A_THREAD = """
import subprocess, sys, threading, time
def start():
    global child
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    time.sleep(600)
threading.Thread(target=start).start()
"""


def test_a_process_that_has_ended_is_told_from_a_later_one_with_its_number() -> None:
    child = subprocess.Popen(["sleep", "600"])
    process = Process.of(child.pid)
    assert process.lives
    assert process.parent() == Process.of(os.getpid())
    with pytest.raises(ProcessLookupError):
        Process(child.pid, process.started - 1).signal(signal.SIGKILL)
    assert child.poll() is None
    process.signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended and its parent has not asked for it yet
    assert not process.lives
    with pytest.raises(ProcessLookupError):
        process.signal(signal.SIGKILL)
    child.wait()
    with pytest.raises(ProcessLookupError):
        process.signal(signal.SIGKILL)


@pytest.mark.parametrize("pid", [0, 1, -1])
def test_groups_and_init_are_never_touched(pid: int) -> None:
    with pytest.raises(ProcessLookupError):
        Process.of(pid)


def test_what_any_thread_started_dies_with_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", FROM_A_THREAD], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    assert children_of(child.pid) == [grandchild]
    assert parent_of(grandchild) == child.pid
    kill_tree(child.pid)
    assert child.wait(10) == -signal.SIGKILL
    child.stdout.read()  # ends when the last holder of the pipe has ended
    child.stdout.close()
    kill_tree(child.pid)
