"""How loaded one process's machine is: a few numbers that cost about a millisecond to read."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import torch

FIELDS = (
    "cpu_percent",
    "memory_percent",
    "shm_percent",
    "rss_gb",
    "gpu_percent",
    "gpu_memory_gb",
    "gpu_peak_gb",
    "gpu_watts",
)
"""Names of what `Machine.read` returns, in its order."""

SHM = Path("/dev/shm")  # noqa: S108 - its filling is what is asked


class Machine:
    """One rank's look at its node, process and card."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        psutil.cpu_percent()  # the first reading is the beginning of the next one's interval

    def read(self) -> list[float]:
        """Values of FIELDS: the node's CPU since the last reading; NaN where there is no such thing."""
        shm = shutil.disk_usage(SHM) if SHM.is_dir() else None
        return [
            psutil.cpu_percent(),
            psutil.virtual_memory().percent,
            100 * shm.used / shm.total if shm and shm.total else float("nan"),
            self._process.memory_info().rss / 1e9,
            *self._card(),
        ]

    def _card(self) -> list[float]:
        if self._device.type != "cuda":
            return [float("nan")] * 4
        free, total = torch.cuda.mem_get_info(self._device)
        return [
            *_driver(self._device, "utilization"),
            (total - free) / 1e9,
            torch.cuda.max_memory_allocated(self._device) / 1e9,
            *(milliwatts / 1000 for milliwatts in _driver(self._device, "power_draw")),
        ]


def _driver(device: torch.device, what: str) -> list[float]:
    """One number that the driver's library tells; NaN without that library."""
    try:
        return [float(getattr(torch.cuda, what)(device))]
    except (ModuleNotFoundError, RuntimeError):  # no nvidia-ml-py, or a card that does not tell
        return [float("nan")]


def by_node(hosts: list[str], readings: list[list[float]]) -> dict[str, dict[str, float]]:
    """Readings of all ranks as one record a node. Pure.

    The node's own numbers are the largest that its ranks saw, memory of processes and power are summed; what nobody
    has is left out.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for host, reading in zip(hosts, readings, strict=True):
        for name, value in zip(FIELDS, reading, strict=True):
            if value == value:  # NaN is not
                found.setdefault(host, {}).setdefault(name, []).append(value)
    summed = ("rss_gb", "gpu_watts")
    return {
        host: {name: round(sum(some) if name in summed else max(some), 3) for name, some in fields.items()}
        for host, fields in found.items()
    }
