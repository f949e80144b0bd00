"""Runs a test body on several real processes: `@pytest.mark.world_size(n)`.

Each rank is a fresh interpreter with one thread, in a gloo group, with the variables that Ray would set. The test
function gets the same arguments on every rank (they must be picklable) and passes when all ranks return.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_S = 240


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_on_ranks(path: Path, function: str, arguments: dict[str, Any], size: int) -> None:
    """Call `function` of the test file `path` on `size` ranks; raise AssertionError with a failed rank's traceback."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, size, port, path, function, arguments, results), daemon=False)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        failures = []
        for _ in ranks:
            rank, failure = results.get(timeout=TIMEOUT_S)
            if failure:
                failures.append(f"rank {rank}:\n{failure}")
                break  # the others may wait for it for ever
        assert not failures, "\n".join(failures)
        for process in ranks:
            process.join(TIMEOUT_S)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


@pytest.fixture
def alone() -> Iterator[None]:
    """The test's own process is the only rank of a gloo group, for a test that holds other things in its hands."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _rank(
    rank: int, size: int, port: int, path: Path, function: str, arguments: dict[str, Any], results: Any
) -> None:  # fmt: skip
    try:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            OMP_NUM_THREADS="1",
            DS_ACCELERATOR="cpu",
        )
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        spec = importlib.util.spec_from_file_location(f"ranked_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        getattr(module, function)(**arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise
    results.put((rank, None))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Take over the call of a test that is marked with a world size."""
    marker = pyfuncitem.get_closest_marker("world_size")
    if marker is None:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    run_on_ranks(pyfuncitem.path, pyfuncitem.originalname, arguments, marker.args[0])
    return True
