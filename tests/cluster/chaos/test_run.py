"""A stand-in for the driver, with real processes as ranks: which are hit, when, and which never."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.chaos.__main__ import main
from cluster.chaos.plan import Fault, Kind, Plan
from cluster.chaos.run import Run
from diffussm.checkpoint.store import open_store
from diffussm.config import dump
from diffussm.config.places import absolutely
from diffussm.config.schema import Config
from diffussm.errors import ConfigError, ExitCode

DRIVER = """
import json, pathlib, signal, subprocess, sys, time
run, images = pathlib.Path(sys.argv[1]), int(sys.argv[2])
done = 0
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
attempt = len(list(run.glob("attempts/*"))) + 1
while done < images:
    ranks = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    places = {rank: {"pid": each.pid} for rank, each in enumerate(ranks)}
    file = run / f"attempts/{attempt}/ranks.json"
    file.parent.mkdir(parents=True)
    file.with_suffix(".part").write_text(json.dumps(places))
    file.with_suffix(".part").rename(file)
    time.sleep(1)  # it restores
    while done < images and all(each.poll() is None for each in ranks):
        done += 8
        with (run / "metrics.jsonl").open("a") as log:
            record = {"images": done, "attempt": attempt, "time": time.time(), "loss": 1.0, "samples": done}
            log.write(json.dumps(record) + "\\n")
        time.sleep(0.05)
    for each in ranks:
        each.kill()
        each.wait()
    attempt += 1
"""


def run_of(folder: Path, images: int) -> Run:
    command = [sys.executable, "-c", DRIVER, str(folder), str(images)]
    return Run(command, open_store(str(folder)), "attempts/{}/ranks.json")


def attempts(folder: Path) -> int:
    return len(list((folder / "attempts").iterdir()))


def test_a_fault_at_images_waits_for_the_training_and_hits_one_rank(tmp_path: Path) -> None:
    run = run_of(tmp_path, 320)
    assert run.go(Plan(0, (Fault(Kind.KILL_RANK, 80), Fault(Kind.KILL_RANK, 80, rank=1))), 1) == 0
    assert [each.attempt for each in run.made] == [1, 2], "the second waited until the run had come back"
    assert all(each.images >= 80 for each in run.made)
    assert attempts(tmp_path) == 3


def test_a_fault_after_a_time_falls_into_the_recovery(tmp_path: Path) -> None:
    run = run_of(tmp_path, 320)
    faults = (Fault(Kind.KILL_RANK, 80, rank=0), Fault(Kind.KILL_RANK, 80, after_s=0.3, rank=0))
    assert run.go(Plan(0, faults), 1) == 0
    first, second = run.made
    between = [each for each in run.records() if first.time < each["time"] < second.time]
    assert second.attempt == 2
    assert second.time - first.time >= 0.3
    assert not [each for each in between if each["attempt"] == 2], "no step lay between"


def test_a_warned_driver_is_started_again_and_then_hit(tmp_path: Path) -> None:
    run = run_of(tmp_path, 400)
    faults = (Fault(Kind.WARN, 40, for_s=30), Fault(Kind.KILL_RANK, 40, after_s=0))
    assert run.go(Plan(0, faults), 3) == 0
    assert [each.name for each in run.made] == ["warn", "kill-rank"]


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_processes_of_an_older_run_are_never_hit(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    """Their numbers stand in a file that no start of this driver wrote."""
    old = tmp_path / "attempts" / "7"
    old.mkdir(parents=True)
    (old / "ranks.json").write_text(json.dumps({"0": {"pid": bystander.pid}, "1": {"pid": 0}}))
    (tmp_path / "metrics.jsonl").write_text('{"images": 9999, "attempt": 7, "time": 1}\n')
    command = [sys.executable, "-c", "import time; time.sleep(2)"]
    run = Run(command, open_store(str(tmp_path)), "attempts/{}/ranks.json")
    assert run.go(Plan(0, (Fault(Kind.KILL_RANK, 8),)), 1) == 0
    assert bystander.poll() is None
    assert not run.made
    with pytest.raises(ConfigError, match="exists already"):
        run.check_new()


def test_a_new_run_is_one_without_anything_in_its_store(tmp_path: Path) -> None:
    run_of(tmp_path / "new", 8).check_new()


def test_a_run_that_was_trained_otherwise_is_not_compared_with(tmp_path: Path) -> None:
    cfg = absolutely(Config())
    (tmp_path / "config.yaml").write_text(dump(replace(cfg, name="x-calm", train=replace(cfg.train, log_images=8))))
    run = run_of(tmp_path, 8)
    run.check_same(cfg)
    for other, key in ((replace(cfg, seed=1), "seed"), (replace(cfg, train=replace(cfg.train, lr=1.0)), "train.lr")):
        with pytest.raises(ConfigError, match=f"was trained with another {key}"):
            run.check_same(other)


def test_a_rank_that_is_not_there_is_no_rank(tmp_path: Path) -> None:
    run = run_of(tmp_path, 200)
    assert run.go(Plan(0, (Fault(Kind.KILL_RANK, 40, rank=2),)), 1) == 0
    assert not run.made
    assert attempts(tmp_path) == 1


@pytest.mark.parametrize(
    ("rank", "images", "code"),
    [(1, 400, 0), (1, 160, 1), (0, 400, 1)],
    ids=["all made", "over too soon", "not undone"],
)
def test_the_tool_ends_well_only_if_all_faults_were_made_and_undone(
    rank: int,
    images: int,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ours(config: str, overrides: Sequence[str], name: str, cfg: Config) -> Run:
        return run_of(tmp_path / name, images)

    monkeypatch.setattr(Run, "ours", ours)
    undo = ["true"] if rank else ["false"]
    faults = [
        {"fault": "kill-rank", "at_images": 80, "rank": rank},
        {"fault": "command", "at_images": 240, "command": ["true"], "undo": undo, "for_s": 600},
    ]
    (tmp_path / "plan").write_text(json.dumps({"faults": faults}))
    config = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
    command = ["--plan", str(tmp_path / "plan"), config, f"storage={tmp_path}", "name=x", "cluster.workers=2"]
    assert main(command) == code
    said = capsys.readouterr().out
    assert f"{1 if images == 160 else 2} of 2 faults made" in said
    assert "DIFFERENT" not in said
    assert ("NOT UNDONE: false" in said) == (rank == 0)
    assert main(command) == ExitCode.CONFIG, "its second use of the name"


def test_ranks_of_another_host_are_refused_without_a_cluster_to_reach_it(tmp_path: Path) -> None:
    file = tmp_path / "attempts" / "1" / "ranks.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"0": {"pid": 1, "host": "elsewhere"}}))
    run = Run(["sleep", "600"], open_store(str(tmp_path)), "attempts/{}/ranks.json")
    with pytest.raises(ConfigError, match=r"elsewhere: set cluster\.address"):
        run.go(Plan(0, (Fault(Kind.KILL_RANK, 8),)), 1)


def test_an_interruption_undoes_what_was_made(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    """A command that fails ends the tool while another process is still stopped."""
    (tmp_path / "pid").write_text(str(bystander.pid))
    run = run_of(tmp_path / "run", 4000)
    faults = (
        Fault(Kind.STOP_PROCESS, 8, pid_file=str(tmp_path / "pid"), for_s=600),
        Fault(Kind.COMMAND, 8, after_s=0.2, command=("false",)),
    )
    with pytest.raises(ConfigError, match="false failed"):
        run.go(Plan(0, faults), 1)
    assert [each.name for each in run.made] == ["stop-process"]
    assert "T" not in Path(f"/proc/{bystander.pid}/stat").read_text().rpartition(")")[2].split()[0]
