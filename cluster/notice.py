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

AGAIN_S = 2.0
"""Seconds between two tries to have the node drained."""


class Notice:
    """Looks for `path` and drains this node once it is there. `grace_s`: seconds from its appearance to the kill."""

    def __init__(self, path: str, grace_s: float) -> None:
        self._path = Path(path) if path else None
        self._grace_s = grace_s
        self._is_told, self._deadline_s = False, 0.0
        self._thread: threading.Thread | None = None
        self._next = 0.0

    def look(self) -> None:
        """Act if the file is there; returns at once. Ray is asked again until it drains the node.

        Raises:
            OSError: the file cannot be looked for.
        """
        busy = self._thread is not None and self._thread.is_alive()
        if self._path is None or self._is_told or busy or time.monotonic() < self._next or not self._path.exists():
            return
        self._deadline_s = self._deadline_s or time.time() + self._grace_s
        if time.time() > self._deadline_s:
            return
        self._next = time.monotonic() + AGAIN_S
        said = f"notice file {self._path}"
        self._thread = threading.Thread(target=self._drain, args=(said,), name="notice", daemon=True)
        self._thread.start()

    def _drain(self, said: str) -> None:
        here = ray.get_runtime_context().get_node_id()
        try:
            found = [node for node in nodes.nodes() if node.id == here]
            drains = any(node.drain_deadline_s is not None for node in found)
            self._is_told = drains or bool(nodes.drain(found, self._deadline_s, said))
            if not self._is_told:
                _LOG.warning("%s: Ray does not drain node %s", said, here)
        except ray.exceptions.RayError as error:
            _LOG.warning("%s: node %s is not drained: %s", said, here, error)
