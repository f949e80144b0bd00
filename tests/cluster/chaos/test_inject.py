"""Faults on real processes and folders of this host."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.chaos.inject import inject
from cluster.chaos.plan import Fault, Kind
from cluster.chaos.undo import Undos
from cluster.processes import Process, kill_tree
from cluster.stacks import state_of
from diffussm.errors import ConfigError
from tests.disks import small_disk

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


def state(pid: int) -> str:
    try:
        return state_of(Process.of(pid))
    except ProcessLookupError:
        return ""


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


def make(kind: Kind, target: int, undos: Undos, driver: int = 0, **more: object) -> None:
    process = Process.of(target)
    inject(Fault(kind, 0, **more), process, Process.of(driver) if driver else process, undos)  # type: ignore[arg-type]


@pytest.fixture
def undos() -> Iterator[Undos]:
    with Undos() as pending:
        yield pending
    assert not pending.failed


def test_a_stopped_rank_goes_on_after_its_time(parent: tuple[subprocess.Popen[str], int], undos: Undos) -> None:
    _, child = parent
    make(Kind.STOP_RANK, child, undos, for_s=0.5)
    assert until(lambda: state(child) == "stopped")
    assert until(lambda: state(child) == "asleep")


def test_what_is_stopped_for_ever_goes_on_when_the_tool_ends(
    parent: tuple[subprocess.Popen[str], int], tmp_path: Path
) -> None:  # fmt: skip
    _, child = parent
    (tmp_path / "pid").write_text(str(child))
    with Undos() as undos:
        make(Kind.STOP_RANK, child, undos)
        make(Kind.STOP_PROCESS, child, undos, pid_file=str(tmp_path / "pid"), for_s=600)
        assert until(lambda: state(child) == "stopped")
    assert until(lambda: state(child) == "asleep")


def test_a_slowed_process_stands_most_of_the_time_and_then_no_more(
    parent: tuple[subprocess.Popen[str], int], tmp_path: Path
) -> None:  # fmt: skip
    _, child = parent
    (tmp_path / "pid").write_text(str(child))
    with Undos() as undos:
        make(Kind.SLOW_PROCESS, child, undos, pid_file=str(tmp_path / "pid"), for_s=600)
        seen = []
        for _ in range(200):
            seen.append(state(child))
            time.sleep(0.005)
        assert seen.count("stopped") > seen.count("asleep") > 0
    assert until(lambda: state(child) == "asleep")
    time.sleep(0.3)
    assert state(child) == "asleep"
    assert undos.failed == []


def test_a_pid_file_of_a_process_that_has_ended_is_told_and_not_waited_for(
    parent: tuple[subprocess.Popen[str], int], tmp_path: Path, undos: Undos
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / "pid").write_text(str(ended.pid))
    with pytest.raises(ConfigError, match=r"pid_file .* names no process"):
        make(Kind.STOP_PROCESS, parent[1], undos, pid_file=str(tmp_path / "pid"), for_s=600)


def test_a_node_dies_with_all_that_runs_there(parent: tuple[subprocess.Popen[str], int], undos: Undos) -> None:
    process, child = parent
    make(Kind.KILL_NODE, child, undos)
    assert process.wait(10) == -signal.SIGKILL
    assert until(lambda: state(child) in ("", "dead"))


def test_a_rank_without_memory_gets_a_memory_error(parent: tuple[subprocess.Popen[str], int], undos: Undos) -> None:
    process, _ = parent
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{64 << 20}\n")
    assert process.stdout.readline() == "got\n"
    make(Kind.LIMIT_MEMORY, process.pid, undos)
    process.stdin.write(f"{512 << 20}\n")
    assert process.stdout.readline() == "no memory\n"


def test_a_warning_is_sigterm_and_then_the_end(parent: tuple[subprocess.Popen[str], int], undos: Undos) -> None:
    process, child = parent
    make(Kind.WARN, child, undos, driver=process.pid, for_s=30)
    assert process.wait(10) == -signal.SIGTERM
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind.hits_rank])
def test_a_rank_that_has_ended_is_not_mistaken_for_another(
    kind: Kind, parent: tuple[subprocess.Popen[str], int], undos: Undos
) -> None:  # fmt: skip
    """The number is that of a living process, which started at another time."""
    process, child = parent
    gone = Process(child, Process.of(child).started - 1)
    with pytest.raises(ProcessLookupError):
        inject(Fault(kind, 0, device="lo"), gone, gone, undos)
    assert process.poll() is None
    assert state(child) in ("running", "asleep")
    assert resource.prlimit(child, resource.RLIMIT_AS) == resource.getrlimit(resource.RLIMIT_AS)


def test_commands_of_the_plan_are_run_and_undone(tmp_path: Path, undos: Undos) -> None:
    mark = tmp_path / "mark"
    make(Kind.COMMAND, os.getpid(), undos, command=("touch", str(mark)), undo=("rm", str(mark)), for_s=0.2)
    assert mark.exists()
    assert until(lambda: not mark.exists())
    with pytest.raises(ConfigError, match="false failed"):
        make(Kind.COMMAND, os.getpid(), undos, command=("false",))


def test_a_full_disk_has_room_again_when_the_tool_ends(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8 << 20) as disk:
        with Undos() as undos:
            make(Kind.FILL_DISK, os.getpid(), undos, folder=str(disk), for_s=600)
            assert shutil.disk_usage(disk).free <= 1 << 20
        assert not list(disk.iterdir())
    with Undos() as undos, pytest.raises(ConfigError, match="nowhere"):
        make(Kind.FILL_DISK, os.getpid(), undos, folder=str(tmp_path / "nowhere"), for_s=1)


def test_a_link_comes_up_again_after_its_process_has_ended() -> None:
    """In a network namespace that only the process holds."""
    command = ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec sleep 600"]
    if shutil.which("unshare") is None or shutil.which("nsenter") is None or shutil.which("ip") is None:
        pytest.skip("no unshare, nsenter or ip")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "up\n":
            pytest.skip("this user may not make a network namespace")
        space = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY)
        with Undos() as undos:
            make(Kind.CUT_NETWORK, process.pid, undos, device="lo")
            assert "UP" not in flags(space)
            process.kill()
            process.wait()
        assert not undos.failed
        assert "UP" in flags(space)
        os.close(space)
    finally:
        process.kill()
        process.communicate()


def flags(space: int) -> list[str]:
    """Of the loopback device of an open namespace."""
    command = ["nsenter", f"--net=/proc/self/fd/{space}", "ip", "-o", "link", "show", "lo"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, pass_fds=(space,)).stdout
    return said[said.index("<") + 1 : said.index(">")].split(",")
