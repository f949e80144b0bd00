"""Makes faults on this host: signals, limits, links and disks, and says to `Undos` how each is undone."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cluster.chaos.plan import Fault, Kind
from cluster.chaos.undo import Undos
from cluster.processes import Process
from diffussm.errors import ConfigError

HEADROOM_BYTES = 4 << 20
"""Memory that a rank may still allocate under LIMIT_MEMORY."""
TURN_S = 0.02
"""A slowed process runs so long at a time."""
LEFT_BYTES = 1 << 20
"""Room that FILL_DISK leaves, less than any checkpoint needs."""


def inject(fault: Fault, target: Process, driver: Process, undos: Undos) -> None:
    """Make one fault.

    Args:
        fault: what to do.
        target: the process of the rank it hits.
        driver: the process of the driver.
        undos: is told how it is undone.

    Raises:
        ProcessLookupError: the process it should hit has ended; nothing was made.
        ConfigError: a command of the plan failed, or a file that it names is not there.
    """
    match fault.kind:
        case Kind.KILL_RANK:
            target.signal(signal.SIGKILL)
        case Kind.STOP_RANK:
            stop(target, fault.for_s, undos)
        case Kind.KILL_NODE:
            target.parent().kill_tree()
        case Kind.LIMIT_MEMORY:
            limit_memory(target)
        case Kind.WARN:
            driver.signal(signal.SIGTERM)
            undos.later(fault.for_s, f"the driver {driver.pid}", driver.kill_tree)
        case Kind.CUT_NETWORK:
            cut(target, fault.device, fault.for_s, undos)
        case Kind.FILL_DISK:
            fill(Path(fault.folder), fault.for_s, undos)
        case Kind.STOP_PROCESS:
            stop(named_in(Path(fault.pid_file)), fault.for_s, undos)
        case Kind.SLOW_PROCESS:
            slow(named_in(Path(fault.pid_file)), fault.for_s, undos)
        case Kind.COMMAND:
            if fault.undo:
                undos.later(fault.for_s, " ".join(fault.undo), partial(run, fault.undo))
            run(fault.command)


def stop(process: Process, for_s: float, undos: Undos) -> None:
    """SIGSTOP, and SIGCONT after `for_s` seconds; with 0 when the tool ends."""
    undos.later(for_s, f"the stopped process {process.pid}", partial(process.signal, signal.SIGCONT))
    process.signal(signal.SIGSTOP)


def slow(process: Process, for_s: float, undos: Undos) -> None:
    """Let a process run only a tenth of the time for `for_s` seconds, by stopping it again and again."""
    over = threading.Event()

    def hold() -> None:
        try:
            while not over.is_set():
                process.signal(signal.SIGSTOP)
                over.wait(9 * TURN_S)
                process.signal(signal.SIGCONT)
                over.wait(TURN_S)
        except ProcessLookupError:  # it has ended
            return

    def release() -> None:
        over.set()
        if thread.ident is not None:
            thread.join()
        process.signal(signal.SIGCONT)

    thread = threading.Thread(target=hold, name="slow", daemon=True)
    undos.later(for_s, f"the slowed process {process.pid}", release)
    thread.start()


def limit_memory(process: Process) -> None:
    """Let a process allocate no more than a few megabytes beyond what it has."""
    try:
        pages = int(Path("/proc", str(process.pid), "statm").read_text().split()[0])
    except FileNotFoundError:
        raise ProcessLookupError(f"process {process.pid} has ended") from None
    most = pages * resource.getpagesize() + HEADROOM_BYTES
    if not process.lives:
        raise ProcessLookupError(f"process {process.pid} has ended")
    resource.prlimit(process.pid, resource.RLIMIT_AS, (most, most))


def cut(process: Process, device: str, for_s: float, undos: Undos) -> None:
    """Set a link down in the network namespace of a process, and up again after `for_s` seconds.

    The namespace is held open: it must be found again when the process has ended.
    """
    try:
        space = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY)
    except FileNotFoundError:
        raise ProcessLookupError(f"process {process.pid} has ended") from None

    def restore() -> None:
        try:
            link(space, device, "up")
        finally:
            os.close(space)

    if not process.lives:
        os.close(space)
        raise ProcessLookupError(f"process {process.pid} has ended")
    undos.later(for_s, f"link {device} of process {process.pid}", restore)
    link(space, device, "down")


def link(space: int, device: str, state: str) -> None:
    """Set a link up or down in an open network namespace."""
    run(("nsenter", f"--net=/proc/self/fd/{space}", "ip", "link", "set", device, state), (space,))


def fill(folder: Path, for_s: float, undos: Undos) -> None:
    """Fill the file system of `folder` for `for_s` seconds.

    Raises:
        ConfigError: there is no such folder, or it cannot be filled.
    """
    try:
        handle, file = tempfile.mkstemp(prefix="diffussm-chaos-", dir=folder)
        undos.later(for_s, f"the file {file}", partial(Path(file).unlink, missing_ok=True))
        with os.fdopen(handle, "wb") as body:
            os.posix_fallocate(body.fileno(), 0, max(1, shutil.disk_usage(folder).free - LEFT_BYTES))
    except OSError as error:
        raise ConfigError(f"plan: folder {str(folder)!r} cannot be filled ({error})") from error


def named_in(pid_file: Path) -> Process:
    """The process whose number is in a file."""
    try:
        return Process.of(int(pid_file.read_text()))
    except (FileNotFoundError, ValueError, ProcessLookupError) as error:
        raise ConfigError(f"plan: pid_file {str(pid_file)!r} names no process ({error})") from error


def run(command: Sequence[str], keep: Sequence[int] = ()) -> None:
    """Run a command of the plan, which is given the open files `keep`; raises ConfigError if it fails."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, pass_fds=keep)  # noqa: S603 - the user's own words, and no shell
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"plan: {' '.join(command)} failed ({error.stderr.strip() or error})") from error
    except OSError as error:
        raise ConfigError(f"plan: {' '.join(command)} could not be run ({error})") from error
