"""`python -m cluster.chaos CONFIG --plan PLAN [key=value ...]`: make faults in a run and compare it with a calm one.

Two runs are trained on the cluster that the config names: NAME-calm, left alone (it is reused when it is there), and
NAME-chaos, whose driver is started again whenever it ends with a code that asks for it, as a scheduler would. Ranks
on other hosts are reached through Ray (cluster.address). NAME-chaos must not exist yet. With --plain the same network
is killed under plain Ray Train too (the plan's kill-rank faults only). Exit code 0: all faults were made and undone,
and the run ended with the same samples and losses. 1: not so.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import yaml

from cluster.chaos.compare import compare, table
from cluster.chaos.plan import Kind, Plan, read
from cluster.chaos.run import Run
from diffussm.config import check, load
from diffussm.config.schema import Config
from diffussm.errors import ConfigError, DiffuSSMError, ExitCode
from diffussm.observe.goodput import goodput

SPARE_STARTS = 20
"""Starts of the driver beyond one for each fault, where the user names no number."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the calm and the faulty run, print comparison and table, return the exit code."""
    parser = argparse.ArgumentParser(prog="diffussm chaos", description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--plan", required=True, help="YAML file of faults")
    parser.add_argument("--starts", type=int, default=0, help="most starts of the driver; 0: one a fault, and 20")
    parser.add_argument("--plain", action="store_true", help="kill the same network under plain Ray Train too")
    asked = parser.parse_args(arguments)
    try:
        return chaos(asked.config, asked.overrides, Path(asked.plan), asked.starts, asked.plain)
    except DiffuSSMError as error:
        print(f"diffussm: {type(error).__name__}: {error}", file=sys.stderr)
        return int(error.code)
    except KeyboardInterrupt:
        return 130


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def chaos(config: str, overrides: Sequence[str], plan_file: Path, starts: int, plain: bool) -> int:
    """As the module says."""
    cfg = load(config, overrides)
    check(cfg)
    try:
        plan = read(yaml.safe_load(plan_file.read_text()), cfg.train.images, cfg.cluster.workers)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{plan_file}: cannot be read as a plan ({error})") from error
    calm, faulty = (Run.ours(config, overrides, f"{cfg.name}-{kind}", cfg) for kind in ("calm", "chaos"))
    faulty.check_new()
    if calm.finished(cfg.train.images):
        calm.check_same(cfg)
    else:
        code = calm.go(Plan(0), 1)
        if code:
            print(f"chaos: the calm run ended with code {code}", file=sys.stderr)
            return code
    code = faulty.go(plan, starts or SPARE_STARTS + len(plan.faults))
    result = compare(calm.records(), faulty.records())
    print(table(faulty.made, faulty.records(), cfg.train.images, result))
    print(f"{len(faulty.made)} of {len(plan.faults)} faults made; the driver ended with code {code}")
    print(result)
    print(f"without faults: {goodput(calm.store).table()}\nwith faults: {goodput(faulty.store).table()}")
    for each in faulty.not_undone:
        print(f"NOT UNDONE: {each}")
    if plain:
        print(_plain(config, overrides, plan, cfg))
    good = code == 0 and result.equal and len(faulty.made) == len(plan.faults) and not faulty.not_undone
    return int(ExitCode.DONE if good else ExitCode.INTERNAL)


def _plain(config: str, overrides: Sequence[str], plan: Plan, cfg: Config) -> str:
    """The table of plain Ray Train under the plan's kills."""
    kills = Plan(plan.seed, tuple(fault for fault in plan.faults if fault.kind is Kind.KILL_RANK))
    with tempfile.TemporaryDirectory(prefix=f"{cfg.name}-plain-") as folder:
        run = Run.plain(config, overrides, folder)
        code = run.go(kills, 1)
        return f"plain Ray Train, code {code}:\n{table(run.made, run.records(), cfg.train.images)}"


if __name__ == "__main__":
    for each in (signal.SIGTERM, signal.SIGHUP):  # as an interruption: what was broken is mended on the way out
        signal.signal(each, _leave)
    sys.exit(main())
