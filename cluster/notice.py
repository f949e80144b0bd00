"""A notice file on a rank's node: the cloud takes this node away, so Ray is told to drain it.

The file is written by the cloud's or the scheduler's agent on the node that goes, which need not be the driver's. A
drain is what every other warning of a node becomes too: the overseer sees it and decides who leaves.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import ray

from cluster import nodes

_LOG = logging.getLogger("diffussm.cluster")


class Notice:
    """Looks for `path` and drains this node once it is there. `grace_s`: seconds from its appearance to the kill."""

    def __init__(self, path: str, grace_s: float) -> None:
        self._path = Path(path) if path else None
        self._grace_s = grace_s
        self._told = False

    def look(self) -> None:
        """Act if the file is there; returns at once."""
        if self._path is None or self._told or not self._path.exists():
            return
        self._told = True
        deadline_s = time.time() + self._grace_s
        said = f"notice file {self._path}"
        threading.Thread(target=_drain, args=(deadline_s, said), name="notice", daemon=True).start()


def _drain(deadline_s: float, said: str) -> None:
    here = ray.get_runtime_context().get_node_id()
    try:
        found = [node for node in nodes.nodes() if node.id == here]
        if not any(node.drain_deadline_s is not None for node in found) and not nodes.drain(found, deadline_s, said):
            _LOG.warning("%s: Ray does not drain node %s", said, here)
    except ray.exceptions.RayError as error:
        _LOG.warning("%s: node %s is not drained: %s", said, here, error)
