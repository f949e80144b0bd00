"""A Ray cluster of several nodes on this machine: each is a raylet of its own, which can be killed and added."""

from __future__ import annotations

import os
import signal
from typing import Any

from cluster import env
from cluster.chaos.inject import kill_tree, parent_of
from diffussm.config.schema import Config

QUICK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""Ray's own looks at its nodes, so that a lost one is given up after seconds."""


class Nodes:
    """A head that holds no workers, and one node of one CPU for each worker."""

    def __init__(self, workers: int) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._ray = ray
        given = env.apply(Config(name="x")) | {"WANDB_MODE": "disabled"}
        memory = {"object_store_memory": 80 << 20}
        self._cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "_system_config": QUICK, "include_dashboard": False} | memory,
        )
        for _ in range(workers):
            self.add()
        ray.init(address=self._cluster.address, log_to_driver=False, runtime_env={"env_vars": given})

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()
        self._cluster.shutdown()

    def add(self) -> None:
        """A node of one CPU comes."""
        self._cluster.add_node(num_cpus=1, object_store_memory=80 << 20)

    def kill(self, worker: int) -> None:
        """SIGKILL the node on which this worker process runs, and all its processes."""
        raylet = parent_of(worker)
        os.kill(raylet, signal.SIGKILL)
        kill_tree(raylet)
