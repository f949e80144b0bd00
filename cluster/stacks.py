"""What the processes of a group were doing: stacks of all threads, state in the kernel, NCCL's flight recorder.

Runs on each rank's node from a process of its own, so that a rank that is stuck or stopped needs not to help.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from cluster.hub import Place
from cluster.nodes import nodes, on_node, reached
from cluster.processes import Process
from cluster.pulse import STACKS_SIGNAL

TIMEOUT_S = 20.0
"""Seconds for a node to answer; a process is started there first. One that is cut off is not asked."""
WRITE_S = 2.0
"""Seconds for a process to write its stacks."""
MOST_BYTES = 1 << 20
"""Of one file of evidence; the rest is cut off."""

RECORDER_S = 10.0
"""Seconds for NCCL's threads, which look each second, to see that their flight recorder is asked for and write it."""
RECORDER = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
"""Environment variable with the prefix of the flight recorders' files; the rank follows."""
RECORDER_PIPE = "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"
"""Environment variable with the prefix of the pipes that ask for them; the rank and `.pipe` follow."""

STATES = {"T": "stopped", "t": "traced", "D": "waiting for the disk", "Z": "dead", "R": "running", "S": "asleep"}


def collect(places: Mapping[int, Place]) -> dict[int, dict[str, Any]]:
    """Evidence by rank from every node that answers."""
    asked = [
        ray.remote(num_cpus=0, max_retries=0)(look)
        .options(scheduling_strategy=on_node(node))
        .remote({rank: (place.process, place.stacks) for rank, place in places.items() if place.node == node})
        for node in _there(places)
    ]
    return _gather(asked)


def kill(places: Mapping[int, Place]) -> None:
    """SIGKILL every process of the group on every node that answers."""
    asked = [
        ray.remote(num_cpus=0, max_retries=0)(end)
        .options(scheduling_strategy=on_node(node))
        .remote([place.process for place in places.values() if place.node == node])
        for node in _there(places)
    ]
    _gather(asked)


def _there(places: Mapping[int, Place]) -> list[str]:
    """Ids of the group's nodes that can be reached."""
    return sorted({place.node for place in places.values()} & {node.id for node in reached(nodes()) if node.alive})


def _gather(asked: list[Any]) -> dict[int, dict[str, Any]]:
    """Results of the tasks that end in time; the others are on nodes that are gone or cut off."""
    done, late = ray.wait(asked, num_returns=len(asked), timeout=TIMEOUT_S) if asked else ([], [])
    found: dict[int, dict[str, Any]] = {}
    for each in done:
        try:
            found.update(ray.get(each) or {})
        except ray.exceptions.RayError:  # its node died meanwhile: no evidence from there, which the reader sees
            continue
    for each in late:
        ray.cancel(each, force=True)
    return found


def look(processes: Mapping[int, tuple[Process, str]]) -> dict[int, dict[str, Any]]:
    """State, place in the kernel and stacks of processes of this node: rank -> (process, file for its stacks)."""
    found: dict[int, dict[str, Any]] = {
        rank: {"pid": each.pid, "state": state_of(each), "wchan": _proc(each, "wchan")}
        for rank, (each, _) in processes.items()
    }
    asked = {rank: time.time() for rank in processes if _ask_recorder(rank)}
    for rank, (process, file) in processes.items():
        if found[rank]["state"] not in ("", "stopped", "traced", "dead"):
            found[rank]["stacks"] = dump(process, Path(file))
    deadline = time.monotonic() + RECORDER_S
    for rank, since in asked.items():
        found[rank]["flight_recorder"] = _recorded(rank, since, deadline)
    return found


def _ask_recorder(rank: int) -> bool:
    """Ask NCCL in a rank of this node to write its flight recorder; whether it listens. Collectives end too late."""
    prefix = os.environ.get(RECORDER_PIPE)
    if not prefix:
        return False
    try:
        pipe = os.open(f"{prefix}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # no pipe, or nobody reads it: no NCCL there
        return False
    try:
        os.write(pipe, b"1")
    finally:
        os.close(pipe)
    return True


def _recorded(rank: int, since: float, deadline: float) -> bytes:
    """The recorder written after `since`, seconds since 1970, once it is whole; empty if there is none in time."""
    file, size = Path(f"{os.environ.get(RECORDER, '')}{rank}"), -1
    while time.monotonic() < deadline:
        if file.exists() and (now := file.stat()).st_mtime >= since - 1:  # a file's clock is coarser
            if 0 < now.st_size == size:
                return file.read_bytes()[:MOST_BYTES]
            size = now.st_size
        time.sleep(0.1)
    return b""


def dump(process: Process, file: Path) -> str:
    """Make a process write its stacks to `file` and read them; empty if it does not, or has ended."""
    before = file.stat().st_size if file.exists() else 0
    try:
        process.signal(STACKS_SIGNAL)
    except ProcessLookupError:
        return ""
    deadline, size = time.monotonic() + WRITE_S, -1
    while time.monotonic() < deadline:
        now = file.stat().st_size if file.exists() else 0
        if now > before and now == size:  # it grew, and has not grown since the last look
            break
        size = now
        time.sleep(0.05)
    return file.read_text(errors="replace")[before:][:MOST_BYTES] if file.exists() else ""


def state_of(process: Process) -> str:
    """A process's state in words; empty if there is none."""
    fields = _proc(process, "stat").rpartition(")")[2].split()
    if not fields or int(fields[19]) != process.started:  # none, or another's that has its number
        return ""
    return STATES.get(fields[0], "running")


def end(processes: list[Process]) -> None:
    """SIGKILL processes of this node; one that is gone already is well."""
    for process in processes:
        try:
            process.signal(signal.SIGKILL)
        except ProcessLookupError:
            continue


def _proc(process: Process, name: str) -> str:
    try:
        return Path("/proc", str(process.pid), name).read_text().strip()
    except OSError:  # the process is gone
        return ""
