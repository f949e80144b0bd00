"""Evaluations while training goes on: the training never waits for one, and none is lost with a killed start."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from cluster import nodes, scoring
from cluster.evaluate import JOURNAL, Job, Stopped, workers
from diffussm.checkpoint.store import Store
from diffussm.config.schema import Config
from diffussm.errors import DiffuSSMError
from diffussm.evaluate.run import Result
from diffussm.observe.events import Journal
from diffussm.train.intervals import due

LOOK_S = 5.0
"""Between two looks for room in the cluster."""
STOP_S = 10.0
"""Longest wait for an evaluation that is to stop: a warned job has little time."""


def room(resources: Mapping[str, float], cfg: Config) -> int:
    """How many workers of an evaluation fit into a cluster without touching what the training takes at full size.

    Not what is free now: between two attempts of the training everything is, and an evaluation that took it would
    make the training wait.
    """
    cluster = cfg.cluster
    fits = [
        int((resources.get(kind, 0.0) - cluster.workers * each) / each)
        for kind, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker))
        if each
    ]
    return max(0, min(workers(cfg), *fits))


class Beside:
    """Evaluations while training goes on: hears of each saved checkpoint and never makes the training wait.

    One thread copies the weights of a checkpoint that is due, before the training deletes it; another evaluates them
    one after another on Ray workers, as soon as the cluster has room for those, and stops when nodes go and the
    training needs their place. What is not done when the training ends is done then; what a killed start leaves is done
    by the next.
    """

    def __init__(self, cfg: Config, store: Store, announce: Callable[[dict[str, Any]], None]) -> None:
        self._cfg, self._store, self._announce = cfg, store, announce
        self._saved: queue.Queue[int | None] = queue.Queue()
        self._todo: queue.Queue[int | None] = queue.Queue()
        self._stop, self._trained = threading.Event(), threading.Event()
        self._looked, self._in_the_way = 0.0, False
        self._last = 0
        for images in scoring.kept(store):
            self._todo.put(images)
            self._last = images
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("keep weights", self._keep), ("evaluate", self._evaluate))
        ]
        for thread in self._threads:
            thread.start()

    def hear(self, message: dict[str, Any]) -> None:
        """Note a record of the workers; returns at once."""
        # Those on the node's own folder are many, and this process may not see them.
        if message.get("event") == "saved" and message.get("tier") == "storage":
            self._saved.put(int(message["images"]))

    def close(self, *, finish: bool) -> None:
        """Wait for what is left; without `finish` stop at once, which costs the blocks in hand."""
        if not finish:
            self._stop.set()
        self._trained.set()
        self._saved.put(None)
        for thread in self._threads:
            thread.join(None if finish else STOP_S)

    def _keep(self) -> None:
        every, total = self._cfg.evaluate.every_images, self._cfg.train.images
        while (images := self._saved.get()) is not None:
            # The end is evaluated by the stage after the training.
            if images >= total or not due(images, images - self._last, every, total):
                continue
            try:
                scoring.keep_weights(self._cfg, self._store, images)
            except DiffuSSMError as error:
                self._tell("evaluation skipped", images, error.message)
                continue
            self._last = images
            self._todo.put(images)
        self._todo.put(None)

    def _evaluate(self) -> None:
        while (images := self._todo.get()) is not None:
            place = scoring.kept_place(self._cfg, images)
            cfg = replace(self._cfg, sample=replace(self._cfg.sample, weights=place))
            try:
                result = self._beside_training(cfg)
            except Stopped:
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, the training goes on and the error is shown
                self._tell("evaluation failed", images, str(error))
                continue
            scoring.release(self._store, images)
            self._announce({"kind": "evaluation", "line": result.line()} | result.record())

    def _beside_training(self, cfg: Config) -> Result:
        """The result of an evaluation that gives way when the training needs its place, and goes on in another.

        Raises:
            Stopped: the job ends.
        """
        while True:
            count = self._wait_for_room()
            job = Job(cfg, self._store, None, say=lambda line: None, stop=partial(self._must_stop, count))
            try:
                return job.on_ray(count)
            except Stopped:  # its blocks are in the store
                if self._stop.is_set():
                    raise

    def _must_stop(self, count: int) -> bool:
        """Whether the job ends, or nodes went and `count` workers are in the training's way."""
        now = time.monotonic()
        if not self._trained.is_set() and now - self._looked >= LOOK_S:
            self._looked = now
            self._in_the_way = self._room() < count
        return self._stop.is_set() or (self._in_the_way and not self._trained.is_set())

    def _room(self) -> int:
        """Workers that fit beside the training on the nodes that are there and stay."""
        return room(nodes.total(nodes.usable(nodes.reached(nodes.nodes()), ())), self._cfg)

    def _wait_for_room(self) -> int:
        """How many workers fit beside the training; waits while there is room for none and the training goes on."""
        while not self._trained.is_set():
            if count := self._room():
                self._looked, self._in_the_way = time.monotonic(), False
                return count
            self._trained.wait(LOOK_S)
        if self._stop.is_set():
            raise Stopped
        return workers(self._cfg)

    def _tell(self, event: str, images: int, reason: str) -> None:
        self._announce({"kind": "event", "event": event, "images": images, "reason": reason})
        journal = Journal(self._store, JOURNAL)
        journal.write({"event": event, "images": images, "reason": reason})
        journal.close()
