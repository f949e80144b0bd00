"""Evidence of real processes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.processes import Process
from cluster.stacks import dump, end, look, state_of

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
    found = look({1: (Process.of(stuck.pid), file)})[1]
    assert "stuck_here" in found["stacks"]
    assert found["state"] in ("asleep", "running")
    assert look({1: (Process.of(stuck.pid), file)})[1]["stacks"].count("stuck_here") == 1, "only what is new"


def test_a_stopped_process_is_named_and_not_asked(stuck: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(stuck.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while state_of(Process.of(stuck.pid)) != "stopped" and time.monotonic() < deadline:
        time.sleep(0.01)
    found = look({0: (Process.of(stuck.pid), str(tmp_path / "stacks"))})[0]
    assert found["state"] == "stopped"
    assert "stacks" not in found
    end([Process.of(stuck.pid)])
    assert stuck.wait(10) == -signal.SIGKILL


def test_a_process_that_is_gone_is_no_error(stuck: subprocess.Popen[str], tmp_path: Path) -> None:
    gone = Process.of(stuck.pid)
    stuck.kill()
    stuck.wait()
    assert look({0: (gone, str(tmp_path / "none"))})[0]["state"] == ""
    assert dump(gone, tmp_path / "none") == ""
    end([gone])


def test_a_process_that_has_the_number_of_one_that_is_gone_is_left_alone(
    stuck: subprocess.Popen[str], tmp_path: Path
) -> None:
    file = tmp_path / "stacks"
    gone = Process(stuck.pid, Process.of(stuck.pid).started - 1)
    found = look({0: (gone, str(file))})[0]
    assert (found["state"], "stacks" in found) == ("", False)
    assert dump(gone, file) == ""
    end([gone])
    assert stuck.poll() is None


def recorder(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(prefix))
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_PIPE_FILE", str(prefix))


def test_the_flight_recorder_is_asked_for_and_an_old_one_is_not_taken(
    stuck: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A thread stands in for NCCL's, which needs a GPU: it reads the pipe and writes the file in two parts."""
    prefix = tmp_path / "nccl-"
    recorder(prefix, monkeypatch)
    written = tmp_path / "nccl-3"
    written.write_text("of an earlier hang")
    os.utime(written, (1, 1))
    os.mkfifo(tmp_path / "nccl-3.pipe")
    pipe = os.open(tmp_path / "nccl-3.pipe", os.O_RDONLY | os.O_NONBLOCK)

    def nccl() -> None:
        select.select([pipe], [], [], 30)
        assert os.read(pipe, 1) == b"1"
        written.write_text("collective 7")

    thread = threading.Thread(target=nccl)
    thread.start()
    found = look({3: (Process.of(stuck.pid), str(tmp_path / "stacks"))})[3]
    thread.join()
    os.close(pipe)
    assert found["flight_recorder"] == b"collective 7"
    assert "stuck_here" in found["stacks"]


def test_without_nccl_no_recorder_is_waited_for(
    stuck: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    recorder(tmp_path / "nccl-", monkeypatch)
    (tmp_path / "nccl-3").write_text("of an earlier hang")
    os.mkfifo(tmp_path / "nccl-3.pipe")  # nobody reads it
    assert "flight_recorder" not in look({3: (Process.of(stuck.pid), str(tmp_path / "stacks"))})[3]
