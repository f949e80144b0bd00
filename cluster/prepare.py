"""Make latents on Ray: an encoder actor for each worker, units handed out as they get free.

A worker, node or driver that dies loses the units it has in hand and nothing else: what is done stands in the ledger,
and a unit's shards are the same bytes whoever makes them.
"""

from __future__ import annotations

import collections
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from diffussm.data.encode import Work
from diffussm.data.encoder import UNITS_AT_ONCE, Encoder, Job, Progress
from diffussm.data.ledger import Record
from diffussm.data.units import Unit
from diffussm.errors import DiffuSSMError, InfrastructureError, StorageError

START_S = 300.0
"""With no worker for so long, there is no room for one in the cluster."""
_LOOK_S = 5.0
_CLOSE_S = 30.0
_logger = logging.getLogger(__name__)

Announce = Callable[[dict[str, Any]], None]


class EncodeWorker:
    """The actor. Loading is a call of its own, so that its errors come back typed."""

    def load(self, job: Job) -> dict[str, Any]:
        """Load the network; returns who this is. Raises as `Encoder`."""
        self._encoder = Encoder(job)
        return {"host": socket.gethostname(), "pid": os.getpid()}

    def run(self, unit: Unit) -> Record:
        """Encode a unit; raises as `Encoder.run`. Two calls at once overlap decoding with encoding."""
        return self._encoder.run(unit)

    def close(self) -> None:
        """Remove scratch files."""
        self._encoder.close()


@dataclass
class Worker:
    """The driver's side of one actor."""

    actor: Any
    loading: Any
    """Reference of `load`; None once it is done."""
    in_hand: dict[Any, Unit] = field(default_factory=dict)
    """Units by reference of `run`."""

    @property
    def refs(self) -> list[Any]:
        """What to wait for."""
        return [self.loading] if self.loading is not None else list(self.in_hand)


def verdict(losses: int, max_failures: int, in_hand: Mapping[int, int]) -> str:
    """Why to stop after `losses` lost workers, empty to go on. Pure.

    Args:
        losses: workers lost, and units that failed for a passing reason, in this start.
        max_failures: how many may be.
        in_hand: how often each unit was in hand then; one that stands out may be what kills its workers.
    """
    if losses <= max_failures:
        return ""
    most = sorted(in_hand.items(), key=lambda entry: (-entry[1], entry[0]))[:3]
    named = ", ".join(f"unit {unit} ({times} times)" for unit, times in most)
    return f"{losses} workers or uploads were lost, prepare.max_failures={max_failures}; most often in hand: {named}"


def run(work: Work, progress: Progress, announce: Announce) -> None:
    """Do all units of `work.todo` on the connected Ray cluster.

    Args:
        work: as `encode.begin` made it, for the device that workers have.
        progress: called when the first worker is ready, and as units are done.
        announce: hears of workers that are ready (`host`, `pid`) or lost (`reason`).

    Raises:
        DataError, CorruptImageError: a worker met a fault of the pictures, which would be met again.
        InfrastructureError: more than `prepare.max_failures` were lost, or no worker could be started.
    """
    _Pool(work, progress, announce).run()


class _Pool:
    """The workers of one start, and the units that are not in anybody's hand."""

    def __init__(self, work: Work, progress: Progress, announce: Announce) -> None:
        self.work, self.progress, self.announce = work, progress, announce
        self.waiting = collections.deque(work.todo)
        self.left = len(self.waiting)
        self.done_images = work.done_images
        self.workers: list[Worker] = []
        self.losses = 0
        self.began = False
        self.in_hand_at_loss: collections.Counter[int] = collections.Counter()
        self.job = ray.put(work.job)
        prepare = work.job.cfg.prepare
        self.actor_class: Any = ray.remote(EncodeWorker).options(
            num_cpus=prepare.cpus_per_worker,
            num_gpus=prepare.gpus_per_worker,
            max_concurrency=UNITS_AT_ONCE,
            max_restarts=0,  # lost workers are counted and replaced here
        )

    def run(self) -> None:
        """Until every unit is done."""
        heard = time.monotonic()
        try:
            while self.left:
                self._fill()
                refs = [ref for worker in self.workers for ref in worker.refs]
                finished, _ = ray.wait(refs, num_returns=1, timeout=_LOOK_S)
                if finished or any(worker.in_hand for worker in self.workers):
                    heard = time.monotonic()
                elif time.monotonic() - heard > START_S:
                    raise InfrastructureError(
                        f"prepare: no worker could be started within {START_S:.0f} s; each asks for "
                        f"{self.work.job.cfg.prepare.cpus_per_worker:g} CPUs and "
                        f"{self.work.job.cfg.prepare.gpus_per_worker:g} GPUs of {ray.cluster_resources()}",
                        "ask for less in prepare.*, or start the same command when the cluster has room",
                    )
                for ref in finished:
                    self._settle(ref)
        finally:
            self._close()

    def _fill(self) -> None:
        """Start missing workers, no more than there are units, and give each free one its next units."""
        while len(self.workers) < min(self.work.job.cfg.prepare.workers, self.left):
            actor: Any = self.actor_class.remote()
            self.workers.append(Worker(actor, actor.load.remote(self.job)))
        # In turns, so that the last units are spread over all workers.
        for depth in range(UNITS_AT_ONCE):
            for worker in self.workers:
                if self.waiting and worker.loading is None and len(worker.in_hand) <= depth:
                    unit = self.waiting.popleft()
                    worker.in_hand[worker.actor.run.remote(unit)] = unit

    def _settle(self, ref: Any) -> None:
        """Take what `ref` gives: a worker that is ready, a unit that is done, or a loss."""
        worker = next((each for each in self.workers if ref in each.refs), None)
        if worker is None:
            return  # of a worker that was lost a moment ago
        try:
            result = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, StorageError):
                raise cause if isinstance(cause, DiffuSSMError) else RuntimeError(str(error)) from error
            self._lose(worker, ref, cause.message)
        except ray.exceptions.RayError as error:
            self._lose(worker, None, str(error).splitlines()[0])
        else:
            if worker.loading is not None:
                worker.loading = None
                if not self.began:
                    self.began = True
                    self.progress(self.done_images, self.work.ledger.plan.images)
                self.announce({"kind": "event", "event": "encoder ready"} | result)
                return
            unit = worker.in_hand.pop(ref)
            self.work.records[unit.number] = result
            self.left -= 1
            self.done_images += len(unit.items)
            self.progress(self.done_images, self.work.ledger.plan.images)

    def _lose(self, worker: Worker, ref: Any, reason: str) -> None:
        """Take back the unit of `ref`, or the worker with all its units for None, within the budget."""
        self.losses += 1
        if ref is None or worker.loading is not None:
            units = list(worker.in_hand.values())
            self.workers.remove(worker)
            ray.kill(worker.actor)
        else:
            units = [worker.in_hand.pop(ref)]
        self.in_hand_at_loss.update(unit.number for unit in units)
        self.waiting.extendleft(reversed(units))
        self.announce(
            {"kind": "event", "event": "encoder lost", "losses": self.losses, "reason": reason}
            | {"units": [unit.number for unit in units]}
        )
        stop = verdict(self.losses, self.work.job.cfg.prepare.max_failures, self.in_hand_at_loss)
        if stop:
            raise InfrastructureError(f"prepare: {stop}: {reason}", "start the same command again: finished units stay")

    def _close(self) -> None:
        """Let workers remove their scratch files, then end them; what a dead one left its successors remove."""
        idle = [worker.actor.close.remote() for worker in self.workers if worker.loading is None and not worker.in_hand]
        try:
            ray.get(idle, timeout=_CLOSE_S)
        except ray.exceptions.RayError as error:
            _logger.warning("scratch files of a worker may be left: %s", error)
        for worker in self.workers:
            ray.kill(worker.actor)
