"""Traces of chosen steps on chosen ranks, into the run: operators in time for a viewer, a table of them, and memory."""

from __future__ import annotations

import json
import logging
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffussm.checkpoint.store import Store
from diffussm.config.schema import Config
from diffussm.errors import StorageError
from diffussm.train.intervals import passed
from diffussm.train.world import World

ROWS = 60
"""Operators in the table."""
ENTRIES = 100_000
"""Allocations and frees of a step that are kept, on a GPU."""

CLOSE_S = 10.0
"""Longest wait at the end of a training for traces that are still on their way."""

Tell = Callable[..., None]
_LOG = logging.getLogger(__name__)


class Profiler:
    """Traces the steps of `train.profile.at_images` on the ranks of `train.profile.ranks`. Local, no collective.

    A traced step is slower, and the others wait for it. Its files go to the store on a thread; a store that refuses
    them, or takes too long, is told as a warning of this rank.
    """

    def __init__(self, cfg: Config, world: World, store: Store, tell: Tell) -> None:
        """`tell` is called with an event's name and details, by the thread that calls `begin` and `close`."""
        self._profile, self._batch = cfg.train.profile, cfg.train.global_batch
        self._world, self._store, self._tell = world, store, tell
        self._is_one = world.rank in self._profile.ranks
        self._gpu = world.device.type == "cuda"
        self._trace: Any = None
        self._records = False
        self._threads: list[threading.Thread] = []
        self._kept: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()

    def begin(self, images: int) -> None:
        """A step begins that ends at `images`: trace it if it is one of those."""
        self._tell_kept()
        if not self._is_one or not any(passed(images, self._batch, at) for at in self._profile.at_images):
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            if self._profile.memory:
                torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
                self._records = True
        self._trace = torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=self._profile.memory
        )
        self._trace.start()

    def end(self, images: int) -> None:
        """The step has ended: if it was traced, write what was seen, and send it on its way."""
        if self._trace is None:
            return
        trace, self._trace = self._trace, None
        trace.stop()
        snapshot = torch.cuda.memory._snapshot() if self._records else None
        self._stop_recording()
        scratch = tempfile.TemporaryDirectory(prefix="diffussm-profile-", ignore_cleanup_errors=True)
        try:
            self._write(Path(scratch.name), trace, snapshot)
        except (OSError, RuntimeError) as error:  # a full disk; torch raises the second
            scratch.cleanup()
            _LOG.warning("the profile of the step to %s images could not be written: %s", f"{images:,}", error)
            return
        thread = threading.Thread(target=self._keep, args=(scratch, images), name="profile", daemon=True)
        thread.start()
        self._threads.append(thread)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """End a trace that was begun, and wait at most `timeout_s` for those on their way."""
        if self._trace is not None:
            self._trace.stop()
            self._trace = None
        self._stop_recording()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        left = sum(thread.is_alive() for thread in self._threads)
        if left:
            _LOG.warning("%d profile(s) were not stored within %g s, and are left", left, timeout_s)
        self._tell_kept()

    def _stop_recording(self) -> None:
        """It slows every allocation, so it ends with the step whatever becomes of the files."""
        if self._records:
            self._records = False
            torch.cuda.memory._record_memory_history(enabled=None)

    def _tell_kept(self) -> None:
        while not self._kept.empty():
            images, folder = self._kept.get()
            self._tell("profile", images=images, folder=folder)

    def _write(self, place: Path, trace: Any, snapshot: Any) -> None:
        rank = f"rank{self._world.rank}"
        trace.export_chrome_trace(str(place / f"{rank}-trace.json.gz"))
        averages = trace.key_averages()
        order = "self_device_time_total" if self._gpu else "self_cpu_time_total"
        (place / f"{rank}-operators.txt").write_text(averages.table(sort_by=order, row_limit=ROWS))
        if self._profile.memory:
            self._write_memory(place, f"{rank}-memory", averages, snapshot)

    def _keep(self, scratch: tempfile.TemporaryDirectory[str], images: int) -> None:
        folder = f"profiles/{images:012d}"
        with scratch as place:
            try:
                for file in sorted(Path(place).iterdir()):
                    self._store.upload(file, f"{folder}/{file.name}")
            except StorageError as error:
                _LOG.warning("%s of rank %d was not stored: %s", folder, self._world.rank, error.message)
                return
        self._kept.put((images, folder))

    def _write_memory(self, place: Path, name: str, averages: Any, snapshot: Any) -> None:
        """Bytes by operator; on a GPU also every block that is held, and a page that shows allocations in time."""
        field = "self_device_memory_usage" if self._gpu else "self_cpu_memory_usage"
        by_operator = sorted(
            ({"operator": e.key, "calls": e.count, "bytes": int(getattr(e, field))} for e in averages),
            key=lambda row: -abs(row["bytes"]),
        )
        body: dict[str, Any] = {"by_operator": [row for row in by_operator if row["bytes"]]}
        if snapshot is not None:
            from torch.cuda import _memory_viz

            body |= {"segments": snapshot["segments"], "peak_bytes": torch.cuda.max_memory_allocated()}
            (place / f"{name}.html").write_text(_memory_viz.trace_plot(snapshot))
        (place / f"{name}.json").write_text(json.dumps(body, default=str))
