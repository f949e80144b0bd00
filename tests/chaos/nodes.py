"""A Ray cluster of several nodes on this machine: each has a raylet of its own, to be killed, warned and added."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cluster import env
from cluster.processes import kill_tree, parent_of
from diffussm.config.schema import Config

ROOT = Path(__file__).parents[2]


class Nodes:
    """A head that holds no workers, and one node of one CPU for each worker, started as launchers do."""

    def __init__(self, workers: int) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._ray = ray
        given = env.apply(Config(name="x")) | {"WANDB_MODE": "disabled"}
        self._cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20},
        )
        self.address: str = self._cluster.address
        self._started: list[subprocess.Popen[bytes]] = []
        ray.init(address=self.address, log_to_driver=False, runtime_env={"env_vars": given})
        for count in range(1, workers + 1):  # one by one: on one host they race for names of sockets
            self.add()
            self.wait(count)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()
        for process in self._started:
            kill_tree(process.pid)
            process.wait()
        self._cluster.shutdown()

    def add(self, cpus: int = 1, **more: str) -> subprocess.Popen[bytes]:
        """A node of one CPU comes. `more` are environment variables of its processes."""
        command = [str(Path(sys.executable).with_name("ray")), "start", "--address", self.address, "--block"]
        command += ["--num-cpus", str(cpus), "--object-store-memory", str(80 << 20)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "25"} | more
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._started.append(process)
        return process

    def wait(self, workers: int) -> None:
        """Until so many nodes for workers are there."""
        deadline = time.monotonic() + 120
        while sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in self._ray.nodes()) != workers:
            assert time.monotonic() < deadline, self._ray.nodes()
            time.sleep(0.1)

    def kill(self, worker: int) -> None:
        """SIGKILL the node on which this worker process runs, and all its processes."""
        kill_tree(parent_of(parent_of(worker)))

    def warn(self, worker: int) -> None:
        """SIGTERM to the `ray start --block` of a worker's node, as an eviction does: it drains the node."""
        os.kill(parent_of(parent_of(worker)), signal.SIGTERM)
