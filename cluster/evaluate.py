"""One evaluation as the driver sees it: blocks made here or shared out among Ray workers, and the result recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import scoring
from cluster.scoring import Scorer
from diffussm.checkpoint.store import Store
from diffussm.config.schema import Config
from diffussm.errors import DiffuSSMError, InfrastructureError
from diffussm.evaluate import blocks, npz
from diffussm.evaluate.blocks import Plan, Report
from diffussm.evaluate.run import Result
from diffussm.observe.curve import curve
from diffussm.observe.events import Journal, read_journal

JOURNAL = "evaluations.jsonl"
CURVE = "evaluations/curve.png"
WAIT_S = 0.5
"""Longest wait for a worker before looking whether to stop."""

Progress = Callable[[int, int], None]
"""(pictures done, pictures in all)."""


class Stopped(Exception):
    """The evaluation was asked to stop; its blocks stay in the store."""


def workers(cfg: Config) -> int:
    """How many workers share an evaluation."""
    return cfg.evaluate.workers or cfg.cluster.workers


@dataclass
class Job:
    """One evaluation, as the driver sees it."""

    cfg: Config
    store: Store
    images: int | None
    """Which checkpoint; None is the newest."""
    npz: str = ""
    """File for the pictures; empty keeps none."""
    say: Callable[[str], None] = print
    progress: Progress = lambda done, total: None
    stop: Callable[[], bool] = lambda: False
    """Asked now and then."""
    _done: int = 0

    def here(self) -> Result:
        """Evaluate in this process."""
        scorer = Scorer(self.cfg, self.images, self.say)
        _, key, plan = scorer.ready()
        if (known := self._known(key, plan)) is not None:
            return known
        began, reports = time.perf_counter(), []
        for index in self._missing(plan):
            self.check_stop()
            reports.append(scorer.make(index, bool(self.npz)))
            self.tell(plan, index)
        return self._end(scorer.finish(reports, time.perf_counter() - began, 1, lambda more: None), key, plan)

    def on_ray(self, count: int) -> Result:
        """Evaluate on `count` Ray workers, in a cluster that this process is connected to."""
        pool = Pool(self, count)
        try:
            _, key, plan = pool.first_ready()
            if (known := self._known(key, plan)) is not None:
                return known
            began = time.perf_counter()
            reports = pool.make(self._missing(plan), plan)
            return self._end(pool.finish(reports, time.perf_counter() - began), key, plan)
        finally:
            pool.close()

    def _known(self, key: str, plan: Plan) -> Result | None:
        found = None if self.npz else scoring.stored_result(self.store, key, plan)
        if found is not None:
            self.say(f"evaluated already: {self.store.url}/{key}")
            record(self.cfg, self.store, found, key)  # a kill may have come between the result and this
            blocks.delete(self.store, plan)
        return found

    def _missing(self, plan: Plan) -> list[int]:
        left = blocks.missing(self.store, plan, bool(self.npz))
        self._done = len(plan.labels) - sum(len(plan.span(index)) for index in left)
        if len(left) < plan.count:
            self.say(f"evaluation goes on: {plan.count - len(left)} of {plan.count} blocks are there")
        return left

    def tell(self, plan: Plan, index: int) -> None:
        """Count a block that is made."""
        self._done += len(plan.span(index))
        self.progress(self._done, len(plan.labels))

    def check_stop(self) -> None:
        """Raise Stopped when asked to stop."""
        if self.stop():
            raise Stopped

    def _end(self, result: Result, key: str, plan: Plan) -> Result:
        """What is left when the result is stored: pictures, journal, W&B, curve; then the blocks go."""
        if self.npz:
            first = next(blocks.pictures(self.store, plan))
            shape = (len(plan.labels), *first.shape[1:])
            npz.write(Path(self.npz), shape, blocks.pictures(self.store, plan), {}, "")  # type: ignore[arg-type]
            self.say(f"pictures: {self.npz}")
        record(self.cfg, self.store, result, key)
        blocks.delete(self.store, plan)
        times = result.times
        self.say(
            f"evaluation: {times['images_made']:,} pictures in {times['blocks_s']:,.0f} s, "
            f"{times['images_per_s']:.2f} pictures/s on {times['workers']} worker(s)"
        )
        return result


class Seat:
    """A Ray worker's place. The first call loads the scorer: Ray takes what a constructor raises for a lost worker."""

    def __init__(self, cfg: Config, images: int | None) -> None:
        self._cfg, self._images = cfg, images

    def ready(self) -> tuple[int, str, Plan]:
        """Load everything; see `Scorer.ready`."""
        self._scorer = Scorer(self._cfg, self._images)
        return self._scorer.ready()

    def make(self, index: int, pictures: bool) -> Report:
        """See `Scorer.make`."""
        return self._scorer.make(index, pictures)

    def finish(self, reports: list[Report], seconds: float, count: int) -> Result:
        """See `Scorer.finish`; progress of the reference has nowhere to go."""
        return self._scorer.finish(reports, seconds, count, lambda more: None)


class Pool:
    """Ray workers of one evaluation. One that is lost is replaced, within `cluster.max_failures`."""

    def __init__(self, job: Job, count: int) -> None:
        import ray

        self._ray: Any = ray
        self._job, self._size, self._lost = job, count, 0
        self._images: int | None = job.images
        cluster = job.cfg.cluster
        actor = ray.remote(num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker)(Seat)
        self._make_actor = lambda: actor.remote(job.cfg, self._images)
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._every: list[Any] = []
        self._start()

    def first_ready(self) -> tuple[int, str, Plan]:
        """Wait for a first worker, which says what is to be done; the others then take that very checkpoint."""
        while True:
            for ref in self._wait(self._starting):
                actor = self._starting.pop(ref)
                found = self._result(ref)
                if found is None:
                    self._start()
                    continue
                self._idle.append(actor)
                # A newer checkpoint may come meanwhile; a file of weights is one already.
                self._images = None if self._job.cfg.sample.weights else found[0]
                for _ in range(self._size - 1):
                    self._start()
                return found  # type: ignore[no-any-return]

    def make(self, left: list[int], plan: Plan) -> list[Report]:
        """Make the blocks `left`: each worker that is ready takes the next one."""
        reports: list[Report] = []
        running: dict[Any, tuple[Any, int]] = {}
        while left or running:
            while left and self._idle:
                index = left.pop(0)
                actor = self._idle.pop()
                running[actor.make.remote(index, bool(self._job.npz))] = actor, index
            for ref in self._wait([*running, *self._starting] if left else running):
                if ref in self._starting:
                    actor = self._starting.pop(ref)
                    if self._result(ref) is None:
                        self._start()
                    else:
                        self._idle.append(actor)
                    continue
                actor, index = running.pop(ref)
                report = self._result(ref)
                if report is None:
                    left.insert(0, index)
                    self._start()
                    continue
                reports.append(report)
                self._idle.append(actor)
                self._job.tell(plan, index)
        return reports

    def finish(self, reports: list[Report], seconds: float) -> Result:
        """Let one worker put the result together."""
        while True:
            while not self._idle:
                for ref in self._wait(self._starting):
                    actor = self._starting.pop(ref)
                    if self._result(ref) is None:
                        self._start()
                    else:
                        self._idle.append(actor)
            last = self._idle[-1]
            (ref,) = self._wait([last.finish.remote(reports, seconds, self._size)])
            result: Result | None = self._result(ref)
            if result is not None:
                return result
            self._idle.pop()
            if not self._idle and not self._starting:
                self._start()

    def close(self) -> None:
        """End all workers at once, those in the middle of a block too: somebody may wait for their place."""
        for actor in self._every:
            self._ray.kill(actor)

    def _start(self) -> None:
        actor: Any = self._make_actor()
        self._every.append(actor)
        self._starting[actor.ready.remote()] = actor

    def _wait(self, refs: Any) -> list[Any]:
        """The references that are done, at least one; raises Stopped when asked to stop."""
        while True:
            self._job.check_stop()
            done, _ = self._ray.wait(list(refs), num_returns=1, timeout=WAIT_S)
            if done:
                return list(done)

    def _result(self, ref: Any) -> Any:
        """What a worker returned, or None if it was lost; a worker's own error is raised as it was there."""
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayActorError as error:
            self._lost += 1
            limit = self._job.cfg.cluster.max_failures
            if self._lost > limit:
                raise InfrastructureError(
                    f"evaluation: workers were lost more than cluster.max_failures={limit} times: {error}",
                    "start the same command again: the blocks that are stored are not made again",
                ) from error
            self._job.say(f"evaluation: a worker was lost ({self._lost} of at most {limit}); its block is made again")
            return None
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, DiffuSSMError) else error from error


def record(cfg: Config, store: Store, result: Result, key: str) -> None:
    """Journal and curve: both hold every evaluation of the run once; a line that is there is not written again."""
    said = {"event": "evaluated", "key": key} | result.record()
    if not any(said.items() <= line.items() for line in read_journal(store, JOURNAL)):
        journal = Journal(store, JOURNAL)
        journal.write(said)
        journal.close()
    store.write(CURVE, curve(read_journal(store, JOURNAL)))
