"""What a figure was measured on, and how a side is timed."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


def describe(device: torch.device) -> str:
    """Processor, threads and library versions in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return (
        f"{name}; {os.cpu_count()} logical cores, {torch.get_num_threads()} threads used; "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def processor() -> str:
    """The processor's name and its widest vector unit, as the kernel tells them."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(fields.get("flags", "").split())
    widest = next((unit for unit in ("avx512f", "avx2", "sse4_2") if unit in flags), "no known vector unit")
    return f"{fields.get('model name', platform.machine())} ({widest})"


def free_bytes() -> int:
    """Memory that a process may still take on this machine; without /proc all that is built in."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])


def risen_gb(call: Callable[[], object]) -> float | None:
    """Call, and say by how many GB this process's resident memory rose in it; None where the kernel cannot tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        call()
        return None
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1e9


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[field].split()[0])


@dataclass(frozen=True)
class Side:
    """One side of a comparison: seconds of each round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def interleave(sides: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> list[Side]:
    """Time all sides in turn, `rounds` times after one round of warm-up, so that drift of the machine meets all alike.

    Wall clock around a synchronised call.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, call in sides.items():
            seconds = timed(call, device)
            if turn:
                times[name].append(seconds)
    return [Side(name, tuple(values)) for name, values in times.items()]


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def paired_ratios(slow: Side, fast: Side) -> Sequence[float]:
    """slow over fast, round by round, in rising order: first, middle and last are the spread and the median."""
    return sorted(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))
