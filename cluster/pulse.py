"""A rank's line to the hub: messages without waiting, and a thread that beats and brings back what is asked."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from cluster.hub import Place
from cluster.notice import Notice
from cluster.processes import Process
from cluster.standby import Standby
from diffussm.config.schema import ClusterConfig
from diffussm.train.control import Control

_LOG = logging.getLogger("diffussm.cluster")

STACKS_SIGNAL = signal.SIGUSR2
"""A worker that gets it writes the stacks of all its threads; done in C, so it works while Python is stuck."""


class Pulse:
    """The heart of one rank, from `start` to `stop`."""

    def __init__(
        self, hub: Any, rank: int, control: Control, cfg: ClusterConfig, stacks: Path, standby: Standby
    ) -> None:  # fmt: skip
        """`stacks` is the file for the stacks of this process, in a folder that others cannot write."""
        self._hub, self._rank, self._control, self._interval_s = hub, rank, control, cfg.heartbeat_interval_s
        self._standby, self._notice = standby, Notice(cfg.notice_file, cfg.grace_s)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        # Opened for good: the signal's handler writes to the descriptor, whatever state Python is in.
        self._stacks = stacks.open("w+")
        self._last: Any = None
        self._failed: set[tuple[str, str]] = set()

    def start(self) -> float:
        """Join the group and begin to beat; returns when the group's start was decided, seconds since 1970."""
        faulthandler.register(STACKS_SIGNAL, self._stacks, all_threads=True)
        node = ray.get_runtime_context().get_node_id()
        place = Place(node, socket.gethostname(), os.getpid(), self._stacks.name, Process.of(os.getpid()).started)
        began = float(ray.get(self._hub.join.remote(self._rank, place)))
        self._thread.start()
        return began

    def tell(self, record: dict[str, Any]) -> None:
        """Send a message to the driver. Returns at once; messages of one rank keep their order."""
        self._last = self._hub.tell.remote(record)

    def stop(self) -> None:
        """Beat a last time and see the last message arrive."""
        self._stop.set()
        self._thread.join()
        if self._last is not None:
            ray.get(self._last)
        faulthandler.unregister(STACKS_SIGNAL)
        self._stacks.close()

    def _beat(self) -> None:
        last = False
        while not last:
            last = self._stop.wait(self._interval_s)
            beat = self._control.phases.beat()
            try:
                self._control.wish = ray.get(self._hub.beat.remote(self._rank, os.getpid(), beat), timeout=30)
            except ray.exceptions.RayError as error:
                # Without the hub nobody can ask anything; training goes on and Ray will end it if the driver is gone.
                _LOG.warning("rank %d: the hub does not answer: %s", self._rank, error)
            if not last:
                self._duty("keep standby processes", self._standby.look, beat.steps)
                self._duty("look for the notice file", self._notice.look)

    def _duty(self, what: str, do: Callable[..., None], *args: Any) -> None:
        """Do one thing beside the heart; what goes wrong in it is said once, for a heart that stops costs the group."""
        try:
            do(*args)
        except Exception as error:  # noqa: BLE001 - a thread that cannot be started, a file that cannot be looked at
            failure = (what, type(error).__name__)
            if failure not in self._failed:
                self._failed.add(failure)
                _LOG.warning("rank %d cannot %s: %s: %s", self._rank, what, type(error).__name__, error)
