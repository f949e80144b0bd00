"""Traces of chosen steps on chosen ranks, into the run: operators in time for a viewer, a table of them, and memory."""

from __future__ import annotations

import json
import tempfile
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

Tell = Callable[..., None]


class Profiler:
    """Traces the steps of `train.profile.at_images` on the ranks of `train.profile.ranks`. Local, no collective.

    A traced step is slower, and the others wait for it; files are written before the next step begins.
    """

    def __init__(self, cfg: Config, world: World, store: Store, tell: Tell) -> None:
        """`tell` is called with an event's name and details."""
        self._profile, self._batch = cfg.train.profile, cfg.train.global_batch
        self._world, self._store, self._tell = world, store, tell
        self._is_one = world.rank in self._profile.ranks
        self._gpu = world.device.type == "cuda"
        self._trace: Any = None

    def begin(self, images: int) -> None:
        """A step begins that ends at `images`: trace it if it is one of those."""
        if not self._is_one or not any(passed(images, self._batch, at) for at in self._profile.at_images):
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            if self._profile.memory:
                torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
        self._trace = torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=self._profile.memory
        )
        self._trace.start()

    def end(self, images: int) -> None:
        """The step has ended: if it was traced, write what was seen. A store that refuses it is told, no more."""
        if self._trace is None:
            return
        trace, self._trace = self._trace, None
        trace.stop()
        folder, rank = f"profiles/{images:012d}", f"rank{self._world.rank}"
        try:
            with tempfile.TemporaryDirectory(prefix="diffussm-profile-") as scratch:
                file = Path(scratch, "trace.json.gz")
                trace.export_chrome_trace(str(file))
                self._store.upload(file, f"{folder}/{rank}-trace.json.gz")
            averages = trace.key_averages()
            order = "self_device_time_total" if self._gpu else "self_cpu_time_total"
            table = averages.table(sort_by=order, row_limit=ROWS)
            self._store.write(f"{folder}/{rank}-operators.txt", table.encode())
            if self._profile.memory:
                self._memory(f"{folder}/{rank}-memory", averages)
        except StorageError as error:
            self._tell("profile not stored", images=images, reason=error.message)
        else:
            self._tell("profile", images=images, folder=folder)

    def _memory(self, place: str, averages: Any) -> None:
        """Bytes by operator; on a GPU also every block that is held, and a page that shows allocations in time."""
        name = "self_device_memory_usage" if self._gpu else "self_cpu_memory_usage"
        by_operator = sorted(
            ({"operator": e.key, "calls": e.count, "bytes": int(getattr(e, name))} for e in averages),
            key=lambda row: -abs(row["bytes"]),
        )
        body: dict[str, Any] = {"by_operator": [row for row in by_operator if row["bytes"]]}
        if self._gpu:
            from torch.cuda import _memory_viz

            snapshot = torch.cuda.memory._snapshot()
            torch.cuda.memory._record_memory_history(enabled=None)
            body |= {"segments": snapshot["segments"], "peak_bytes": torch.cuda.max_memory_allocated()}
            self._store.write(f"{place}.html", _memory_viz.trace_plot(snapshot).encode())
        self._store.write(f"{place}.json", json.dumps(body, default=str).encode())
