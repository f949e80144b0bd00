"""Snapshots of the power-function averages, from which an average of any length is made after the training.

Like a checkpoint, a snapshot costs the step only a copy; the rest follows on a thread with a process group of its own.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffussm.checkpoint.inflight import InFlight
from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.posthoc import FOLDER
from diffussm.checkpoint.save import GROUP, Order, draft
from diffussm.checkpoint.snapshot import Part, Snapshot
from diffussm.checkpoint.tier import Tier
from diffussm.config import digest
from diffussm.config.rules import snapshot_interval
from diffussm.config.schema import SnapshotDtype
from diffussm.errors import Superseded
from diffussm.train.intervals import due
from diffussm.train.saver import Saver

_CLOSE_S = 5.0
"""Seconds a snapshot that was given up has to end."""
_DTYPES = {SnapshotDtype.fp32: torch.float32, SnapshotDtype.bf16: torch.bfloat16, SnapshotDtype.fp16: torch.float16}


class Snapshots:
    """Writes `ema/<images>/`, in the form of a checkpoint that holds the power averages alone.

    A snapshot that fails is told and missed: the fit of later averages is a little worse for it, nothing else.
    """

    def __init__(self, saver: Saver) -> None:
        """Make the snapshots' group. Collective: every rank must. `saver` has what is to be written, and the fence."""
        self.saver, self.cfg, self.averages = saver, saver.cfg, saver.averages
        self._flight: InFlight | None = None
        if not self.averages.power:
            return
        patience = timedelta(seconds=2 * self.cfg.checkpoint.deadline_s + 60)
        self._group = dist.new_group(backend="gloo", timeout=patience, group_desc=GROUP)
        self._snapshot = Snapshot()
        self._snapshot.prepare(self.parts())
        keep = self.cfg.train.keep_ema_snapshots or sys.maxsize
        self._digest = digest(self.cfg)  # takes a tenth of a second
        self._tier = Tier("averages", saver.store, snapshot_interval(self.cfg), 0, keep)

    def parts(self) -> list[Part]:
        """What a snapshot holds of this rank's own slices."""
        dtype = _DTYPES[self.cfg.train.ema_snapshot_dtype]
        found = []
        for piece in self.saver.engine.slices():
            tensors = self.averages.tensors(piece.name)
            kept = {kind: stored(tensors[kind], dtype) for kind in self.averages.power}
            found.append(Part(piece.name, piece.shape, piece.start, kept))
        return found

    def step(self, at: Counters) -> None:
        """Begin a snapshot if one is due; at the end of the training wait for it. Collective: every rank must call it.

        Raises:
            Superseded: a newer attempt has begun.
        """
        train = self.cfg.train
        if not self.averages.power or not due(at.images, train.global_batch, snapshot_interval(self.cfg), train.images):
            return
        ends = at.images >= train.images
        if ends:
            self.wait()
        if self._is_busy():
            self._tell("save skipped", images=at.images, reason="the one before it is still under way")
            return
        self._collect()
        self._begin(at)
        if ends:
            self.wait()
            self._collect()

    def wait(self) -> None:
        """Wait for a snapshot under way, which has its own deadline. Local."""
        if self._flight is not None:
            self._flight.wait(None)

    def close(self) -> None:
        """Give up a snapshot under way and end its thread. Local."""
        if self._flight is not None:
            self._flight.cancel()
            self._flight.wait(_CLOSE_S)

    def _begin(self, at: Counters) -> None:
        began, saver = time.monotonic(), self.saver
        self._snapshot.take(self.parts())
        plan = draft(
            at, saver.engine.shapes, list(self.averages.power), attempt=saver.attempt,
            zero_stage=self.cfg.train.zero_stage, config_digest=self._digest, run_id=saver.run_id,
            permanent=not self.cfg.train.keep_ema_snapshots,
        )  # fmt: skip
        order = Order(
            saver.store, f"{FOLDER}/{at.images:012d}", plan, self._snapshot.source(), self.cfg.checkpoint.deadline_s,
            saver.fence, self._group,
        )  # fmt: skip
        self._flight = InFlight(order, self._snapshot, self._tier, time.monotonic() - began, self._tell)

    def _collect(self) -> None:
        """Take leave of one that has ended; that it failed is told already. Raises Superseded."""
        flight, self._flight = self._flight, None
        if flight is not None and isinstance(flight.error, Superseded):
            raise flight.error

    def _is_busy(self) -> bool:
        """Whether one is still under way on any rank. Collective: every rank must call it."""
        busy = torch.tensor(int(self._flight is not None and not self._flight.done))
        busy = busy.to(self.saver.engine.world.device)
        dist.all_reduce(busy, op=dist.ReduceOp.MAX)
        return bool(busy)

    def _tell(self, what: str, **details: Any) -> None:
        self.saver.logger.event(f"averages {what}", **details)


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` (numel,) as `dtype`, or as they are if that would make a finite one infinite."""
    cast = values.to(dtype)
    return cast if dtype != torch.float16 or torch.equal(cast.isfinite(), values.isfinite()) else values
