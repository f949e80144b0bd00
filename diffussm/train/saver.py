"""Checkpoints of the engine and the averages, saved at intervals counted in images and restored at a start.

A save costs the step only the copy of this rank's slices into host memory. Digest, upload, confirmation and manifest
follow on a thread with a process group of its own, so that nothing the training waits for waits on storage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
import xxhash

from diffussm.checkpoint import restore, retain
from diffussm.checkpoint.fence import Fence, record
from diffussm.checkpoint.inflight import InFlight
from diffussm.checkpoint.manifest import Counters, Manifest
from diffussm.checkpoint.restore import Found
from diffussm.checkpoint.save import GROUP, Order, draft
from diffussm.checkpoint.snapshot import Part, Snapshot
from diffussm.checkpoint.store import NotFound, Store, open_store
from diffussm.checkpoint.tier import Tier, tiers
from diffussm.config import digest
from diffussm.config.schema import Config, Pace
from diffussm.errors import DataError, StorageError, Superseded
from diffussm.naming import join
from diffussm.train.ema import Averages
from diffussm.train.engine import Engine, Slice, StepResult
from diffussm.train.logger import Logger
from diffussm.train.receipt import Receipt
from diffussm.train.rhythm import Rhythm, begun_s
from diffussm.train.step import Inputs

_HURRY = 1.5
"""A departure must have this many times the seconds that the last save took: others may leave at the same time."""
_FENCE_S = 5.0
"""Seconds between two looks for a newer attempt; before each manifest there is another."""


def departure(seconds: Sequence[float | None], left_s: float) -> int:
    """Which tier a departure saves to. Pure.

    Args:
        seconds: what the last save to each tier took, storage first; None where there was none.
        left_s: seconds until the process is killed.

    Storage, which any later start can reach, if there is time or nothing is known of it; else the first tier that is
    fast enough, or else not known to be slow; else the fastest.
    """
    needed = [math.inf if took is None else took * _HURRY for took in seconds]
    if seconds[0] is None or needed[0] <= left_s:
        return 0
    fast = [index for index, least in enumerate(needed) if least <= left_s]
    unknown = [index for index, took in enumerate(seconds) if took is None]
    return next(iter(fast + unknown), needed.index(min(needed)))


class Saver:
    """Checkpoints of the engine and the averages. Building it is a collective call: every rank must.

    Attributes:
        stall_seconds: what the last save cost the step on this rank.
        saved: where the training stood at the last good save to storage.
        snapshot_images: images seen at the last snapshot; -1 before the first.
        due: whether a save to storage was due at the last step; the same on every rank.
    """

    def __init__(
        self, cfg: Config, engine: Engine, averages: Averages, store: Store, attempt: int, logger: Logger
    ) -> None:  # fmt: skip
        """Make the savers' group. Collective: every rank must."""
        self.cfg, self.engine, self.averages, self.logger = cfg, engine, averages, logger
        self.store, self.attempt = store, attempt
        self.fence = Fence(store, attempt)
        self.receipt = Receipt(cfg, engine.world, store, attempt)
        self.leads = engine.world.leads
        if self.leads:
            self.fence.watch(_FENCE_S)
        # A rank that waits for another one's upload must not give up before that one's deadline.
        patience = timedelta(seconds=2 * cfg.checkpoint.deadline_s + 60)
        self._group = dist.new_group(backend="gloo", timeout=patience, group_desc=GROUP)
        self._snapshot = Snapshot()
        self._snapshot.prepare(self.parts(engine.slices()))
        self._flight: InFlight | None = None
        self._failures, self._last_error = 0, ""
        self._seconds: dict[str, float] = {}
        self.stall_seconds = 0.0
        self.at = self.saved = Counters(0, 0, 0, 0, 0, 0)
        self.snapshot_images = -1
        self._run_id = ""
        self._config_digest = digest(cfg)  # takes a tenth of a second
        self.due = False
        self._rhythm: Rhythm | None = None
        self._found: Found | None = None

    def parts(self, slices: list[Slice]) -> list[Part]:
        """What a checkpoint holds of this rank's own slices."""
        return [Part(s.name, s.shape, s.start, s.tensors | self.averages.tensors(s.name)) for s in slices]

    def restore(self) -> Counters:
        """Put the newest checkpoint that verifies into engine and averages. Collective: every rank must call it.

        Returns where the training stands: all zero if there is no checkpoint.

        Raises:
            DataError: there are checkpoints and none can be used, or what was restored is not what was saved.
            StorageError: storage cannot be reached.
        """
        self._tiers = tiers(self.cfg.checkpoint, self.store, self._local_store())
        self._run_id = restore.everyone(self._read_run_id)[0]
        held = [Part(s.name, s.shape, s.start, s.tensors) for s in self.engine.slices(held=True)]
        averaged = [Part(s.name, s.shape, s.start, self.averages.tensors(s.name)) for s in self.engine.slices()]
        found = restore.restore_newest(
            [tier.store for tier in reversed(self._tiers)],  # of equally old ones the nearest
            held + averaged,
            lambda text: self.logger.event("checkpoint refused", reason=text),
            attempt=self.attempt, run_id=self._run_id,
        )  # fmt: skip
        if found is not None:
            self._found = found
            self.at = self.saved = found.manifest.counters
            if found.store is not self.store:  # storage is behind, and may be owed a milestone
                self.saved = restore.everyone(self._stored)[0]
            self.engine.restored(self.at.adam_steps)
        self.receipt.restored(found, self.parts(self.engine.slices()))
        if self.cfg.checkpoint.pace is Pace.auto:
            begun = restore.everyone(lambda: begun_s(self.store) if self.leads else 0.0)[0]
            self._rhythm = Rhythm(self.cfg, self.at.images, self.attempt, begun)
        return self.at

    def step(self, at: Counters, result: StepResult, inputs: Sequence[Inputs]) -> None:
        """Begin a save if one is due; at the end of the training wait for it. Collective: every rank must call it.

        The step itself is noted, or held against an earlier attempt's, where the receipt asks for it.

        Raises:
            StorageError: too many saves in a row have failed, or the last one of the training.
            Superseded: a newer attempt has begun.
            RestoreMismatch: the first step is not the one that was taken before from the restored state.
        """
        before, self.at = self.at, at
        self.receipt.step(before, result, inputs, saved=before.images == self.snapshot_images)
        self.fence.raise_if_lost()
        if self._flight is not None and self._flight.done:
            self._collect()
        if at.images >= self.cfg.train.images:
            for left in range(self.cfg.checkpoint.max_failures - 1, -1, -1):
                try:
                    return self.save_now(self.cfg.checkpoint.deadline_s, read_back=True)
                except (StorageError, DataError):
                    if not left:
                        raise
        tier = next((tier for tier in self._tiers if tier.due(at.images, before.images)), None)
        if self._rhythm is not None and at.images >= self._rhythm.next:
            tier = self._tiers[0]
        self.due = tier is self._tiers[0]
        if tier is None:
            return
        busy, failures = self._agree(int(self._flight is not None), self._failures)
        if busy:
            self.logger.event("save skipped", images=at.images, reason="the one before it is still under way")
        elif failures >= self.cfg.checkpoint.max_failures:
            raise StorageError(
                f"checkpoints: {failures} saves in a row have failed (checkpoint.max_failures="
                f"{self.cfg.checkpoint.max_failures}), the last: {self._last_error}",
                "mend the store; the same command goes on from the last good checkpoint",
            )
        else:
            self._begin(tier, self.cfg.checkpoint.deadline_s, read_back=True)
        if self._rhythm is not None and self.due:
            mine = (
                self._rhythm.interval(at.images, self.stall_seconds, self._seconds.get(self._tiers[0].name))
                if self.leads
                else 0
            )
            self._rhythm.next = at.images + self._agree(mine)[0]

    def save_now(self, deadline_s: float, *, read_back: bool = False, tier: Tier | None = None) -> None:
        """Save where the training stands, to `tier` (storage by default), and wait until it is there. Collective: every
        rank must call it.

        A save under way is waited for first, for at most half of the time; then it is given up. Nothing is done if
        the present state is saved already.

        Args:
            deadline_s: seconds for all of it, for example the notice before a preemption.
            read_back: verify the files in storage and delete what is superfluous, which takes time.

        Raises:
            StorageError: on every rank, if it could not be saved in time.
            Superseded: a newer attempt has begun.
        """
        end = time.monotonic() + deadline_s
        if self._flight is not None:
            self._flight.wait(deadline_s / 2)
            self._flight.cancel()
            self._flight.wait(None)  # it ends by itself now
            self._collect()
        (missing,) = self._agree(int(self.saved != self.at))
        if missing:
            self._begin(tier or self._tiers[0], end - time.monotonic(), read_back=read_back)
            assert self._flight is not None  # noqa: S101 - just begun
            self._flight.wait(None)
            error = self._collect()
            if error is not None:
                raise error

    def leave(self, at: Counters, deadline_s: float) -> None:
        """Save for a departure at a time since 1970, which may be infinite. Collective: every rank must call it.

        It goes to storage unless that took longer lately than there is time, and a nearer tier did not.

        Raises as `save_now`.
        """
        self.at = at
        left = max(1.0, deadline_s - time.time())
        (index,) = self._agree(departure([self._seconds.get(tier.name) for tier in self._tiers], left))
        if index:
            self.logger.event(
                "departure to another tier", tier=self._tiers[index].name, left_s=round(left, 1),
                storage_s=round(self._seconds.get(self._tiers[0].name, 0.0), 1),
            )  # fmt: skip
        wait_s = min(left, self.cfg.checkpoint.deadline_s)
        self.save_now(wait_s, read_back=math.isinf(deadline_s), tier=self._tiers[index])

    @property
    def run_id(self) -> str:
        """What tells this run from an earlier one of its name; known once it is restored."""
        return self._run_id

    def tidy(self) -> None:
        """Delete what a start left that was killed after its last save: where this one found the training complete, no
        save comes that would. Local.

        Raises:
            Superseded: a newer attempt has begun.
        """
        found = self._found
        if not self.leads or found is None or found.store is not self.store:
            return
        if found.manifest.counters.images < self.cfg.train.images:
            return
        try:
            self.fence.check()
            retain.tidy(found.store, found.folder, found.manifest.attempt, self._tiers[0].keep)
        except StorageError as error:
            self.logger.event("delete failed", checkpoint=found.folder, reason=error.message)

    def close(self, timeout_s: float = 60.0) -> None:
        """Wait for a save under way, and for at most `timeout_s` for the receipt; end the threads. Local."""
        if self._flight is not None:
            self._flight.wait(2 * self.cfg.checkpoint.deadline_s + 60)
        self.receipt.close(timeout_s)
        self.fence.close()

    def _begin(self, tier: Tier, deadline_s: float, *, read_back: bool) -> None:
        """Snapshot, and hand the rest to a thread."""
        began, at = time.monotonic(), self.at
        self.snapshot_images = at.images
        parts = self.parts(self.engine.slices())
        self._snapshot.take(parts)
        plan = draft(
            at, self.engine.shapes, list(parts[0].tensors) if parts else [], attempt=self.attempt,
            zero_stage=self.cfg.train.zero_stage, config_digest=self._config_digest, run_id=self._run_id,
            permanent=tier.milestone(at.images, self.saved.images),
        )  # fmt: skip
        order = Order(
            tier.store, f"checkpoints/{at.images:012d}", plan, self._snapshot.source(), deadline_s, self.fence,
            self._group, read_back, self.logger.flush,
        )  # fmt: skip
        self.stall_seconds = time.monotonic() - began
        self._flight = InFlight(order, self._snapshot, tier, self.stall_seconds, self.logger.event)

    def _collect(self) -> Exception | None:
        """Take note of a save that has ended; its error, if it failed. Raises Superseded."""
        flight, self._flight = self._flight, None
        if flight is None:
            return None
        if flight.error is None:
            self._failures = 0
            if flight.seconds is not None:
                self._seconds[flight.tier.name] = flight.seconds
            if flight.tier is self._tiers[0]:
                self.saved = flight.order.draft.counters
            return None
        if isinstance(flight.error, Superseded):
            raise flight.error
        self._failures, self._last_error = self._failures + 1, str(flight.error)
        return flight.error

    def _agree(self, *values: int) -> list[int]:
        """The largest of each value over all ranks. Collective: every rank must call it."""
        found = torch.tensor(values, dtype=torch.int64, device=self.engine.world.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return [int(value) for value in found.tolist()]

    def _local_store(self) -> Store | None:
        """The local tier's store, if there is one and every rank reaches it. Collective: every rank must call it."""
        folder = self.cfg.checkpoint.local
        if not folder:
            return None
        store = open_store(join(folder, self.cfg.name))
        if restore.reachable(store, f"{self.attempt}"):
            return store
        self.logger.event(
            "local checkpoints refused",
            reason=f"checkpoint.local={folder}: not every rank sees this folder; checkpoints go to storage alone",
        )
        return None

    def _stored(self) -> Counters:
        """Where the training stood at the newest checkpoint of this run in storage, as rank 0 sees it."""
        there = restore.manifests(self.store) if self.leads else ()
        mine = (m.counters for _, m in there if isinstance(m, Manifest) and m.run_id == self._run_id)
        return next(mine, Counters(0, 0, 0, 0, 0, 0))

    def _read_run_id(self) -> str:
        """What tells this run from an earlier one of its name: the record of its first attempt."""
        try:
            return xxhash.xxh3_64_hexdigest(self.store.read(record(1))) if self.leads else ""
        except NotFound:
            return ""
