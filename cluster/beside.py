"""Grids and evaluations while training goes on: it never waits for one, and none is lost with a killed start."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster import gallery, nodes, scoring
from cluster.evaluate import JOURNAL, Job, Stopped, workers
from diffussm.checkpoint.store import Store
from diffussm.config.schema import Config
from diffussm.errors import DiffuSSMError
from diffussm.naming import grid_key
from diffussm.observe.events import Journal
from diffussm.train.intervals import due

_LOG = logging.getLogger(__name__)

LOOK_S = 5.0
"""Between two looks for room in the cluster."""
EVALUATION = "evaluation"
STOP_S = 10.0
"""Longest wait for work that is to stop: a warned job has little time."""


def room(resources: Mapping[str, float], cfg: Config) -> int:
    """How many workers beside the training fit into a cluster without touching what that takes at full size.

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


Asked = Callable[[], bool]


@dataclass
class Lane:
    """One kind of work on the weights of saved checkpoints."""

    name: str
    every_images: int
    folder: str
    """Of what it makes; names begin with the images. Weights that wait lie in its `pending`."""
    most: int | None
    """Workers that it can use; None for all that there is room for."""
    work: Callable[[Config, int, int, Asked], None]
    """Called with a config that names the kept weights, their images, how many workers there is room for, and what
    says that they are to stop, upon which it raises Stopped."""
    last: int = 0
    """Images of the newest weights that were taken."""


class Beside:
    """Sample grids and evaluations while training goes on: hears of each saved checkpoint, never makes training wait.

    One thread copies the weights of a checkpoint that is due, before the training deletes it; another draws and
    evaluates them one after another on Ray workers, as soon as the cluster has room for those, and stops when nodes
    go and the training needs their place. What is not done when the training ends is done then; what a killed start
    leaves is done by the next.
    """

    def __init__(self, cfg: Config, store: Store, announce: Callable[[dict[str, Any]], None]) -> None:
        self._cfg, self._store, self._announce = cfg, store, announce
        self._saved: queue.Queue[int | None] = queue.Queue()
        self._todo: queue.Queue[tuple[Lane, int] | None] = queue.Queue()
        self._stop, self._trained = threading.Event(), threading.Event()
        self._looked, self._in_the_way = 0.0, False
        # A grid is there sooner than a score, and who looks waits for it.
        self._lanes = (
            Lane("samples", cfg.sample.every_images, "samples", 1, self._draw),
            Lane(EVALUATION, cfg.evaluate.every_images, "evaluations", None, self._score),
        )
        for lane in self._lanes:
            left = scoring.kept(store, lane.folder)
            done = (key.split("/")[1][:12] for key in store.keys(f"{lane.folder}/"))
            lane.last = max([0, *left, *(int(images) for images in done if images.isdigit())])
            for images in left:
                self._todo.put((lane, images))
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("keep weights", self._keep), ("draw and evaluate", self._work))
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
        total = self._cfg.train.images
        try:
            while (images := self._saved.get()) is not None:
                for lane in self._lanes:
                    every = lane.every_images
                    # Of the end they are made by the stages after the training.
                    if not every or images >= total or not due(images, images - lane.last, every, total):
                        continue
                    try:
                        scoring.keep_weights(self._cfg, self._store, images, lane.folder)
                    except (Exception, SystemExit) as error:  # noqa: BLE001 - want of memory too: the next is tried
                        self._tell(lane, "skipped", images, _said(error))
                        continue
                    lane.last = images
                    self._todo.put((lane, images))
        finally:
            self._todo.put(None)  # whatever became of this thread, the other one and `close` must not wait for ever

    def _work(self) -> None:
        while (found := self._todo.get()) is not None:
            lane, images = found
            try:
                self._beside_training(lane, images)
                scoring.release(self._store, images, lane.folder)
            except Stopped:
                return
            except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, the training goes on and the error is shown
                self._tell(lane, "failed", images, _said(error))

    def _beside_training(self, lane: Lane, images: int) -> None:
        """Work that gives way when the training needs its place, and goes on in another.

        Raises:
            Stopped: the job ends.
        """
        place = scoring.kept_place(self._cfg, images, lane.folder)
        cfg = replace(self._cfg, sample=replace(self._cfg.sample, weights=place))
        while True:
            spare = self._wait_for_room()
            count = spare if lane.most is None else min(lane.most, spare)
            try:
                lane.work(cfg, images, count, partial(self._must_stop, count))
            except Stopped:  # the blocks of an evaluation are in the store
                if self._stop.is_set():
                    raise
            else:
                return

    def _draw(self, cfg: Config, images: int, count: int, stop: Asked) -> None:
        png, credit = gallery.draw(cfg, stop)
        self._store.write(grid_key(images), png)
        self._announce({"kind": "picture", "name": "samples", "images": images, "png": png, "caption": credit})

    def _score(self, cfg: Config, images: int, count: int, stop: Asked) -> None:
        result = Job(cfg, self._store, None, say=lambda line: None, stop=stop).on_ray(count)
        self._announce({"kind": "evaluation", "line": result.line()} | result.record())

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

    def _tell(self, lane: Lane, outcome: str, images: int, reason: str) -> None:
        event = f"{lane.name} {outcome}"
        try:
            self._announce({"kind": "event", "event": event, "images": images, "reason": reason})
            if lane.name == EVALUATION:
                journal = Journal(self._store, JOURNAL)
                journal.write({"event": event, "images": images, "reason": reason})
                journal.close()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - who cannot be told keeps nobody from the next checkpoint
            _LOG.error("cannot tell that %s at %d images (%s): %s", event, images, reason, _said(error))


def _said(error: BaseException) -> str:
    return error.message if isinstance(error, DiffuSSMError) else f"{type(error).__name__}: {error}"
