"""Faults on real processes and folders of this host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.chaos.inject import inject, kill_tree, parent_of
from cluster.chaos.plan import Fault, Kind
from cluster.stacks import state_of

CHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
for line in sys.stdin:
    try:
        size = len(bytearray(int(line)))
        print("got", flush=True)
    except MemoryError:
        print("no memory", flush=True)
"""


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def parent() -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    yield process, int(process.stdout.readline())
    kill_tree(process.pid)
    process.communicate()


def make(kind: Kind, rank_pid: int, driver: int = 0, **more: object) -> None:
    inject(Fault(kind, 0, **more), {0: rank_pid}, driver, 0)  # type: ignore[arg-type]


def test_a_stopped_rank_goes_on_after_its_time(parent: tuple[subprocess.Popen[str], int]) -> None:
    _, child = parent
    make(Kind.STOP_RANK, child, for_s=0.5)
    assert until(lambda: state_of(child) == "stopped")
    assert until(lambda: state_of(child) == "asleep")


def test_a_node_dies_with_all_that_runs_there(parent: tuple[subprocess.Popen[str], int]) -> None:
    process, child = parent
    assert parent_of(child) == process.pid
    make(Kind.KILL_NODE, child)
    assert process.wait(10) == -signal.SIGKILL
    assert until(lambda: state_of(child) in ("", "dead"))


def test_a_rank_without_memory_gets_a_memory_error(parent: tuple[subprocess.Popen[str], int]) -> None:
    process, _ = parent
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{64 << 20}\n")
    assert process.stdout.readline() == "got\n"
    make(Kind.LIMIT_MEMORY, process.pid)
    process.stdin.write(f"{512 << 20}\n")
    assert process.stdout.readline() == "no memory\n"


def test_a_warning_is_sigterm_and_then_the_end(parent: tuple[subprocess.Popen[str], int]) -> None:
    process, child = parent
    make(Kind.WARN, 0, driver=process.pid, for_s=30)
    assert process.wait(10) == -signal.SIGTERM
    os.kill(child, signal.SIGKILL)


def test_commands_of_the_plan_are_run_and_undone(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    make(Kind.COMMAND, 0, command=("touch", str(mark)), undo=("rm", str(mark)), for_s=0.2)
    assert mark.exists()
    assert until(lambda: not mark.exists())
    with pytest.raises(subprocess.CalledProcessError):
        make(Kind.COMMAND, 0, command=("false",))
