"""What one node is like: runs there as a Ray task, reads and measures, changes nothing."""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING

import ray

from diffussm.config.schema import Config
from diffussm.errors import DiffuSSMError

if TYPE_CHECKING:
    import torch

PACKAGES = ("diffussm", "torch", "deepspeed", "ray", "mosaicml-streaming", "numpy")
"""Software that must be the same on every node."""

MATMUL = {"cpu": 512, "cuda": 4096}
"""Side of the square matrices: large enough that a card computes for longer than it takes to ask it."""
ROUNDS = 5
"""Of these the best counts: what disturbs makes slower, never faster."""
REDUCE_BYTES = 4 << 20

Software = tuple[tuple[str, str], ...]
"""Names and versions."""


@dataclass(frozen=True)
class Facts:
    """One node."""

    address: str
    port: int
    """A port that was free there a moment ago, for a meeting with another node."""
    software: Software
    scratch: str
    disk_bytes: int
    shared_memory_bytes: int
    clock_s: float
    """Its clock, seconds since 1970."""
    gpus: int
    gpus_wanted: int
    matmul_s: float
    ill: tuple[str, ...] = ()
    """Things found wrong: storage, data, GPUs."""
    unknown: tuple[str, ...] = ()
    """Things that could not be looked at."""
    reduce_s: float | None = None
    skew_s: float = 0.0
    """Its clock less the driver's, as far as question and answer prove it."""

    def held_against(self, asked_s: float, answered_s: float) -> Facts:
        """The same with the skew: its clock was read between two readings of the driver's."""
        ahead, behind = max(0.0, self.clock_s - answered_s), min(0.0, self.clock_s - asked_s)
        return replace(self, skew_s=ahead or behind)

    def with_reduce(self, seconds: float) -> Facts:
        """The same with the time of an all-reduce."""
        return replace(self, reduce_s=seconds)


def look(cfg: Config, gpus_wanted: int) -> Facts:
    """The facts of this node."""
    scratch = tempfile.gettempdir()
    with closing(socket.socket()) as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    gpus, ill, unknown = _gpus() if gpus_wanted else (0, [], [])
    return Facts(
        address=ray.util.get_node_ip_address(),
        port=port,
        software=software(),
        scratch=scratch,
        disk_bytes=shutil.disk_usage(scratch).free,
        shared_memory_bytes=shutil.disk_usage("/dev/shm").free,  # noqa: S108 - only looked at
        clock_s=time.time(),
        gpus=gpus,
        gpus_wanted=gpus_wanted,
        matmul_s=matmul_seconds(gpus_wanted > 0),
        ill=(*ill, *_storage(cfg)),
        unknown=tuple(unknown),
    )


def software() -> Software:
    """Names and versions of what must be the same everywhere."""
    found = [("python", ".".join(map(str, sys.version_info[:3])))]
    for name in PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append((name, "absent"))
    return tuple(found)


def matmul_seconds(on_gpu: bool) -> float:
    """Seconds of one product of two square fp32 matrices, the best of some; on every GPU, the slowest counts."""
    import torch

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if on_gpu else []
    return max(_matmul_seconds(device) for device in devices or [torch.device("cpu")])


def _matmul_seconds(device: torch.device) -> float:
    import torch

    side = MATMUL[device.type]
    a = torch.ones(side, side, device=device)  # (N, N)
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        total = float((a @ a).sum())  # reading the number waits for the device
        best = min(best, time.perf_counter() - began)
    if total != float(side) ** 3:  # a power of two, and so are all partial sums multiples of one: exact in fp32
        raise RuntimeError(f"{device}: a matrix product is wrong: the sum is {total}, not {float(side) ** 3}")
    return best


def reduce_seconds(rank: int, address: str, port: int) -> float:
    """Seconds of an all-reduce with one other node, the best of some. Collective: ranks 0 and 1 of the meeting."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    try:
        numbers = torch.ones(REDUCE_BYTES // 4)  # (N,)
        best = float("inf")
        for _ in range(ROUNDS):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(numbers)
            best = min(best, time.perf_counter() - began)
        return best
    finally:
        dist.destroy_process_group()


def _storage(cfg: Config) -> list[str]:
    """Whether run folder and latents can be read from here with these credentials."""
    from diffussm.checkpoint.store import open_store
    from diffussm.config.sets import each_set
    from diffussm.data.passport import FILE
    from diffussm.naming import RunPaths

    wrong = []
    try:
        open_store(RunPaths(cfg.storage, cfg.name).root).read("config.yaml")
    except DiffuSSMError as error:
        wrong.append(f"storage: {error.message}")
    for each in each_set(cfg):
        try:
            store = open_store(each.data.latents)
            store.read(FILE)
            store.read("index.json")
        except DiffuSSMError as error:
            wrong.append(f"latents: {error.message}")
    return wrong


def _gpus() -> tuple[int, list[str], list[str]]:
    """GPUs that answer, what NVIDIA's management library says against them, and what it could not be asked."""
    import torch

    try:
        import pynvml  # type: ignore[import-not-found]  # optional: the extra `gpu`
    except ImportError:
        return torch.cuda.device_count(), [], ["memory errors of its GPUs are not looked at: pip install nvidia-ml-py"]
    wrong = []
    pynvml.nvmlInit()
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            try:
                errors = pynvml.nvmlDeviceGetTotalEccErrors(
                    handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
                )
            except pynvml.NVMLError_NotSupported:
                continue
            if errors:
                wrong.append(f"GPU {index}: {errors} uncorrected memory errors since it was started")
    finally:
        pynvml.nvmlShutdown()
    return torch.cuda.device_count(), wrong, []
