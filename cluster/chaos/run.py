"""A run that faults are made in: its driver, started again as a scheduler would, and what its store tells of it."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import yaml

from cluster.chaos.compare import Made
from cluster.chaos.far import Far
from cluster.chaos.inject import inject
from cluster.chaos.plan import Fault, Plan
from cluster.chaos.undo import Undos
from cluster.processes import Process, kill_tree
from diffussm.checkpoint.store import NotFound, Store, open_store
from diffussm.config import dump
from diffussm.config.places import absolutely
from diffussm.config.schema import Config
from diffussm.errors import ConfigError, ExitCode, StorageError
from diffussm.naming import RunPaths
from diffussm.observe.appended import read_end
from diffussm.observe.events import read_journal

AGAIN = frozenset({ExitCode.PREEMPTED, ExitCode.INFRASTRUCTURE, -9})
"""Codes after which a scheduler starts the job again; -9 is a driver that was killed with its node."""

LOOK_S = 0.1
"""Seconds between two looks at whether the next fault is due."""
GROUPS_S = 0.5
"""Seconds between two looks for a new group of ranks."""
TAIL_BYTES = 1 << 14
"""Enough for the last line of a journal."""

Ranks = dict[int, Process | Far]


def _value(config: Mapping[str, Any], key: str) -> Any:
    part, _, name = key.partition(".")
    return config.get(part, {}).get(name)


class Run:
    """One run's driver, started as often as needed."""

    def __init__(self, command: Sequence[str], store: Store, ranks_file: str, address: str = "") -> None:
        """`ranks_file` is the key of a start's places, with {} for the number of the start; `address` that of the Ray
        cluster, without which every rank must be on this host."""
        self.command, self.store, self._address = command, store, address
        self._before, _, self._after = ranks_file.partition("{}")
        self.made: list[Made] = []
        self.not_undone: list[str] = []
        self._attempt, self._ranks, self._looked = 0, Ranks(), 0.0
        self._last: dict[str, Any] = {}

    @classmethod
    def ours(cls, config: str, overrides: Sequence[str], name: str, cfg: Config) -> Run:
        """A run of this project's driver, which logs every step."""
        command = [sys.executable, "-P", "-m", "cluster.driver", "--only", "train", config, *overrides]
        command += [f"name={name}", f"train.log_images={cfg.train.global_batch}"]
        return cls(command, open_store(RunPaths(cfg.storage, name).root), "attempts/{}/ranks.json", cfg.cluster.address)

    @classmethod
    def plain(cls, config: str, overrides: Sequence[str], folder: str) -> Run:
        """Plain Ray Train; see `cluster.chaos.plain`."""
        command = [sys.executable, "-P", "-m", "cluster.chaos.plain", config, folder, *overrides]
        return cls(command, open_store(folder), "ranks-{}.json")

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far."""
        return read_journal(self.store, "metrics.jsonl")

    def finished(self, images: int) -> bool:
        """Whether the last image is logged."""
        return any(record["images"] >= images for record in self.records())

    def check_new(self) -> None:
        """Refuse a run that exists: its processes and records are not those of the faults to be made.

        Raises:
            ConfigError: it does.
        """
        if next(iter(self.store.keys()), None) is not None:
            raise ConfigError(f"{self.store.url} exists already: faults are made in a new run. Remove it, or set name=")

    def check_same(self, cfg: Config) -> None:
        """Refuse to compare with a run that was trained otherwise than `cfg` says.

        Raises:
            ConfigError: names the keys that differ.
        """
        stored, ours = yaml.safe_load(self.store.read("config.yaml")), yaml.safe_load(dump(absolutely(deepcopy(cfg))))
        keys = [f"{part}.{key}" for part in ("data", "model", "diffusion", "train") for key in ours[part]]
        other = [
            key for key in keys
            if key != "train.log_images" and _value(stored, key) != _value(ours, key)
        ]  # fmt: skip
        if stored.get("seed") != ours["seed"] or other:
            raise ConfigError(
                f"{self.store.url} was trained with another {', '.join(other) or 'seed'}: it cannot be compared with",
                "remove it, or set name=",
            )

    def go(self, plan: Plan, most_starts: int) -> int:
        """Start the driver, make the faults of `plan`, start again as a scheduler would; the last exit code.

        `made` has the faults that were made. However this ends, the driver has ended and the faults are undone then;
        `not_undone` has what could not be.
        """
        left, code, source = deque(plan.faults), 0, random.Random(plan.seed)  # noqa: S311 - repeatable on purpose
        undos = Undos()
        self.not_undone = undos.failed
        with undos:
            for _ in range(most_starts):
                code = self._start(left, source, undos)
                if code not in AGAIN:
                    break
        return code

    def _start(self, left: deque[Fault], source: random.Random, undos: Undos) -> int:
        """One start of the driver; its exit code."""
        self._ranks = Ranks()
        process = subprocess.Popen(self.command)  # noqa: S603 - our own command line
        try:
            driver = Process.of(process.pid)
            while process.poll() is None:
                if left and self._make(left[0], driver, source, undos):
                    left.popleft()
                time.sleep(LOOK_S)
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
                process.wait()
        return process.returncode

    def _make(self, fault: Fault, driver: Process, source: random.Random, undos: Undos) -> bool:
        """Make the fault if it is due and what it should hit is there; whether it was made."""
        follows = fault.after_s is not None and bool(self.made)
        if follows and time.time() < self.made[-1].time + (fault.after_s or 0):
            return False
        if not (follows and self._targets(fault, driver)):  # else the store is not needed: a fault may have stopped it
            try:
                self._look_for_ranks(driver)
                self._last = self._read_last()
            except StorageError:  # nothing is there yet, or no answer: asked again at the next look
                return False
        targets = self._targets(fault, driver)
        if not targets or not (follows or self._trains_at(fault.at_images)):
            return False
        rank, target = source.choice(sorted(targets.items()))
        began, images = time.time(), self._last["images"]
        try:
            if isinstance(target, Far):
                began = target.make(fault, undos)
            else:
                inject(fault, target, driver, undos)
        except ConnectionError:  # its node is cut off or lost; another group may be there by now
            self._looked = 0.0
            with contextlib.suppress(StorageError):
                self._look_for_ranks(driver)
            return False
        except ProcessLookupError:  # it ended while we looked: the next one that fits is hit
            if isinstance(target, Far):  # whether it lives is known only now
                self._ranks.pop(rank, None)
            return False
        whom = f" rank {rank}" if fault.kind.hits_rank else ""
        print(f"chaos: {fault.kind.value}{whom} at {images:,} images", file=sys.stderr, flush=True)
        self.made.append(Made(fault.kind.value, began, images, self._attempt))
        return True

    def _targets(self, fault: Fault, driver: Process) -> Ranks:
        """Living processes of which the fault may hit one; none before this start of the driver has had a group."""
        if not fault.kind.hits_rank:
            return {0: driver} if self._ranks else {}
        return {rank: each for rank, each in self._ranks.items() if fault.rank in (None, rank) and each.lives}

    def _trains_at(self, images: int) -> bool:
        """Whether the newest group has done so many images, and a step since the last fault."""
        last = self._last
        recovered = not self.made or last["time"] > self.made[-1].time
        return bool(last["attempt"] == self._attempt and recovered and last["images"] >= images)

    def _look_for_ranks(self, driver: Process) -> None:
        """Find the newest group that the present start of the driver began."""
        if time.monotonic() < self._looked + GROUPS_S:
            return
        self._looked = time.monotonic()
        newest = max(self._attempts(), default=0)
        if newest <= self._attempt:
            return
        places = json.loads(self.store.read(f"{self._before}{newest}{self._after}"))
        here, ranks = socket.gethostname(), Ranks()
        for rank, place in places.items():
            if place.get("host", here) != here:
                if not self._address:
                    raise ConfigError(f"rank {rank} runs on {place['host']}: set cluster.address to reach that host")
                ranks[int(rank)] = Far(self._address, place["node"], Process(place["pid"], place["started"]))
                continue
            try:
                process = Process.of(place["pid"])
            except ProcessLookupError:
                continue
            if process.started > driver.started:  # else its number is an older process's, as in another namespace
                ranks[int(rank)] = process
        self._attempt, self._ranks = newest, ranks

    def _attempts(self) -> list[int]:
        """Numbers of the starts whose places are known."""
        pattern = re.compile(rf"{re.escape(self._before)}(\d+){re.escape(self._after)}")
        found = (pattern.fullmatch(key) for key in self.store.keys(self._before))
        return [int(match[1]) for match in found if match]

    def _read_last(self) -> dict[str, Any]:
        """The last whole line of metrics.jsonl; raises StorageError if there is none."""
        lines = read_end(self.store, "metrics.jsonl", TAIL_BYTES).split(b"\n")[:-1]
        if not lines:
            raise NotFound("metrics.jsonl has no line yet")
        found: dict[str, Any] = json.loads(lines[-1])
        return found
