"""What is done to ranks on other hosts, here through a real Ray on this one; test_long.py has other hosts."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
import ray

from cluster.chaos.far import Far, do
from cluster.chaos.plan import Fault, Kind
from cluster.chaos.undo import Undos
from cluster.processes import Process
from cluster.stacks import state_of
from diffussm.errors import ConfigError


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_acts_are_done_to_that_very_process(child: subprocess.Popen[bytes]) -> None:
    process = Process.of(child.pid)
    do("look", process, ())
    do("stop", process, ())
    until(lambda: state_of(process) == "stopped")
    do("go_on", process, ())
    until(lambda: state_of(process) == "asleep")
    do("limit_memory", process, ())
    assert 0 < resource.prlimit(child.pid, resource.RLIMIT_AS)[0] < 1 << 40
    with pytest.raises(ProcessLookupError):
        do("kill", Process(child.pid, process.started - 1), ())
    assert child.poll() is None
    do("kill", process, ())
    assert child.wait(20) == -9
    with pytest.raises(ProcessLookupError):
        do("look", process, ())


@pytest.mark.timeout(300)
def test_a_rank_is_hit_through_its_node(child: subprocess.Popen[bytes]) -> None:
    ray.init(
        address="local", num_cpus=1, object_store_memory=100 << 20, log_to_driver=False, logging_level="warning",
        include_dashboard=False,
    )  # fmt: skip
    try:
        context = ray.get_runtime_context()
        process = Process.of(child.pid)
        far = Far(context.gcs_address, context.get_node_id(), process)
        before = time.time()
        with Undos() as undos:
            made = far.make(Fault(Kind.STOP_RANK, 8), undos)
            assert before < made < time.time()
            until(lambda: state_of(process) == "stopped")
        assert undos.failed == []
        until(lambda: state_of(process) == "asleep")
        for wrong, words in (
            (Fault(Kind.CUT_NETWORK, 8, device="eth0"), "needs for_s"),
            (Fault(Kind.CUT_NETWORK, 8, device="no-such-link", for_s=1), "no-such-link"),
        ):
            with pytest.raises(ConfigError, match=words):
                far.make(wrong, undos)
        far.make(Fault(Kind.KILL_RANK, 8), undos)
        assert child.wait(20) == -9
        with pytest.raises(ProcessLookupError, match=f"process {child.pid} has ended"):
            far.make(Fault(Kind.KILL_RANK, 8), undos)
        lost = Far(context.gcs_address, "ab" * 28, Process.of(os.getpid()))
        with pytest.raises(ConnectionError, match="does not answer"):
            lost.make(Fault(Kind.STOP_RANK, 8), undos)
    finally:
        ray.shutdown()
