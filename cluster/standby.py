"""Standby processes: beside each rank waits one more worker process that has imported what a rank imports.

Ray Train gives every rank of a new start a new process, and most of a start is what such a process imports. A raylet
can be asked to start processes before they are needed (PrestartWorkers); the next actor with the same runtime
environment gets one of them. Ray offers no public way to ask, so Ray is pinned and tests/cluster/test_standby.py kills
a rank to see that the processes that waited take over.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time

import grpc
import ray

from cluster import nodes
from cluster.env import RANK_PROCESS
from diffussm.errors import InfrastructureError

_LOG = logging.getLogger("diffussm.cluster")

KEEP_S = 900
"""Seconds after which an unused process may end and is asked for again. What a run leaves behind is gone after them."""
ANSWER_S = 5
"""Seconds for the raylet's answer."""

NEEDED = ("ray.train.torch", "deepspeed", "streaming", "diffussm.model.network", "diffussm.train.loop", "cluster.pulse")
"""Imports of every rank. None touches a device: which ones it may use, a process learns when it becomes a rank."""
NEEDED_ON_CPU = ("deepspeed.runtime.zero.muon.muon_optimizer",)
"""DeepSpeed imports it for any optimizer, and with it torch's compiler, which looks at the GPUs there are."""


def warm() -> None:
    """Import what a rank needs, in the processes that are meant for ranks.

    Ray calls it first in every process it starts for the job (`env.WARM`).
    """
    if os.environ.get(RANK_PROCESS.name) != RANK_PROCESS.value:
        return
    names = NEEDED + NEEDED_ON_CPU if os.environ.get("DS_ACCELERATOR") == "cpu" else NEEDED
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError:
        _LOG.exception("a rank's imports fail")  # the rank itself meets it again, where it is a failure with a cause


class Standby:
    """One rank's standby. Asked for once the rank has made a step, so that the imports do not slow its start."""

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted
        self._again = 0.0

    def look(self, steps: int) -> None:
        """Have a standby process if it is time; returns at once. `steps`: completed since this start."""
        if not self._wanted or not steps or time.monotonic() < self._again:
            return
        self._again = time.monotonic() + KEEP_S
        threading.Thread(target=_try, name="standby", daemon=True).start()  # heartbeats must not wait for an answer


def _try() -> None:
    try:
        ask()
    except (InfrastructureError, grpc.RpcError, ray.exceptions.RayError) as error:
        _LOG.warning("no standby process, so the next start will take longer: %s", error)


def ask() -> None:
    """Have this node's raylet start one more process like the present one.

    Raises:
        InfrastructureError: Ray does not know this node any more.
        grpc.RpcError: the raylet does not answer.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc, runtime_environment_pb2

    context = ray.get_runtime_context()
    here = next((node for node in nodes.nodes() if node.id == context.get_node_id()), None)
    if here is None:
        raise InfrastructureError(f"Ray does not know node {context.get_node_id()}", "see the node's log")
    request = node_manager_pb2.PrestartWorkersRequest(  # type: ignore[attr-defined]
        language=common_pb2.Language.Value("PYTHON"),  # type: ignore[attr-defined]
        job_id=bytes.fromhex(context.get_job_id()),
        runtime_env_info=runtime_environment_pb2.RuntimeEnvInfo(  # type: ignore[attr-defined]
            serialized_runtime_env=context.get_runtime_env_string()
        ),
        keep_alive_duration_secs=KEEP_S,
        num_workers=1,
    )
    with init_grpc_channel(f"{here.address}:{here.port}") as channel:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=ANSWER_S)
