"""`python -m cluster.chaos CONFIG --plan PLAN [key=value ...]`: make faults in a run and compare it with a calm one.

Two runs are trained on the cluster that the config names: NAME-calm, left alone (it is reused when it is there), and
NAME-chaos, whose driver is started again whenever it ends with a code that asks for it, as a scheduler would. Every
rank must be on this host. With --plain the same network is killed under plain Ray Train too (the plan's kill-rank
faults only). Exit code 0: the run ended, with the same samples and losses. 1: it did not.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.chaos.compare import Made, compare, table
from cluster.chaos.inject import inject, kill_tree
from cluster.chaos.plan import Fault, Kind, Plan, read
from diffussm.checkpoint.store import NotFound, Store, open_store
from diffussm.config import check, load
from diffussm.config.schema import Config
from diffussm.errors import ConfigError, DiffuSSMError, ExitCode
from diffussm.naming import RunPaths
from diffussm.observe.events import read_journal
from diffussm.observe.goodput import goodput

AGAIN = frozenset({ExitCode.PREEMPTED, ExitCode.INFRASTRUCTURE, -9})
"""Codes after which a scheduler starts the job again; -9 is a driver that was killed with its node."""

LOOK_S = 0.1


class Run:
    """One run's driver, started as often as needed."""

    def __init__(self, command: Sequence[str], store: Store, ranks_file: str) -> None:
        self.command, self.store = command, store
        self._ranks_file = ranks_file
        self.made: list[Made] = []

    @classmethod
    def ours(cls, config: str, overrides: Sequence[str], name: str, cfg: Config) -> Run:
        """A run of this project's driver, which logs every step."""
        command = [sys.executable, "-P", "-m", "cluster.driver", "--only", "train", config, *overrides]
        command += [f"name={name}", f"train.log_images={cfg.train.global_batch}"]
        return cls(command, open_store(RunPaths(cfg.storage, name).root), "attempts/{}/ranks.json")

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

    def go(self, plan: Plan, most_starts: int) -> int:
        """Start the driver, make the faults of `plan`, start again as a scheduler would; the last exit code."""
        left, code, source = list(plan.faults), 0, random.Random(plan.seed)  # noqa: S311 - repeatable on purpose
        for _ in range(most_starts):
            process = subprocess.Popen(self.command)  # noqa: S603 - our own command line
            try:
                while process.poll() is None:
                    if left and self._due(left[0]):
                        self._make(left.pop(0), process.pid, source)
                    time.sleep(LOOK_S)
            finally:
                kill_tree(process.pid)
            code = process.returncode
            if code not in AGAIN:
                break
        return code

    def _due(self, fault: Fault) -> bool:
        records = self.records()
        return bool(records) and records[-1]["images"] >= fault.at_images and self._ranks(records[-1]["attempt"]) != {}

    def _ranks(self, attempt: int) -> dict[int, int]:
        try:
            places = json.loads(self.store.read(self._ranks_file.format(attempt)))
            return {int(rank): place["pid"] for rank, place in places.items()}
        except NotFound:
            return {}

    def _make(self, fault: Fault, driver: int, source: random.Random) -> None:
        last = self.records()[-1]
        ranks = self._ranks(last["attempt"])
        rank = source.choice(sorted(ranks)) if fault.rank is None else fault.rank
        print(f"chaos: {fault.kind.value}, rank {rank}, at {last['images']:,} images", file=sys.stderr)
        self.made.append(Made(fault.kind.value, time.time(), last["images"], last["attempt"]))
        try:
            inject(fault, ranks, driver, rank)
        except ProcessLookupError:
            print(f"chaos: rank {rank} was gone already", file=sys.stderr)
            self.made.pop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the calm and the faulty run, print comparison and table, return the exit code."""
    parser = argparse.ArgumentParser(prog="diffussm chaos", description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--plan", required=True, help="YAML file of faults")
    parser.add_argument("--starts", type=int, default=20, help="most starts of the driver")
    parser.add_argument("--plain", action="store_true", help="kill the same network under plain Ray Train too")
    asked = parser.parse_args(arguments)
    try:
        return chaos(asked.config, asked.overrides, Path(asked.plan), asked.starts, asked.plain)
    except DiffuSSMError as error:
        print(f"diffussm: {type(error).__name__}: {error}", file=sys.stderr)
        return int(error.code)


def chaos(config: str, overrides: Sequence[str], plan_file: Path, starts: int, plain: bool) -> int:
    """As the module says."""
    cfg = load(config, overrides)
    check(cfg)
    try:
        plan = read(yaml.safe_load(plan_file.read_text()), cfg.train.images)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{plan_file}: cannot be read as a plan ({error})") from error
    calm, faulty = (Run.ours(config, overrides, f"{cfg.name}-{kind}", cfg) for kind in ("calm", "chaos"))
    if not calm.finished(cfg.train.images):
        code = calm.go(Plan(0), 1)
        if code:
            print(f"chaos: the calm run ended with code {code}", file=sys.stderr)
            return code
    code = faulty.go(plan, starts)
    result = compare(calm.records(), faulty.records())
    print(table(faulty.made, faulty.records(), cfg.train.images))
    print(f"{len(faulty.made)} of {len(plan.faults)} faults made; the driver ended with code {code}")
    print(result)
    print(f"without faults: {goodput(calm.store).table()}\nwith faults: {goodput(faulty.store).table()}")
    if plain:
        print(_plain(config, overrides, plan, cfg))
    return int(ExitCode.DONE if code == 0 and result.equal else ExitCode.INTERNAL)


def _plain(config: str, overrides: Sequence[str], plan: Plan, cfg: Config) -> str:
    """The table of plain Ray Train under the plan's kills."""
    kills = Plan(plan.seed, tuple(fault for fault in plan.faults if fault.kind is Kind.KILL_RANK))
    with tempfile.TemporaryDirectory(prefix=f"{cfg.name}-plain-") as folder:
        run = Run.plain(config, overrides, folder)
        code = run.go(kills, 1)
        return f"plain Ray Train, code {code}:\n{table(run.made, run.records(), cfg.train.images)}"


if __name__ == "__main__":
    sys.exit(main())
