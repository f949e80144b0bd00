"""The tool `diffussm chaos` on whole runs with a real S3 server, and on nodes whose links can be cut. Minutes each."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.chaos.compare import compare
from cluster.processes import kill_tree
from diffussm.config import dump
from diffussm.errors import ExitCode
from tests.chaos.spaces import NEEDED, Spaces
from tests.disks import small_disk
from tests.runs import BATCH, metrics, tiny_run
from tests.s3 import S3Server

pytestmark = pytest.mark.long

SAVE = 20
TIMEOUT_S, MANY_S = 1500, 3500


def chaos(
    folder: Path, plan: dict[str, Any], *, steps: int, enter: tuple[str, ...] = (), **overrides: object
) -> tuple[int, str]:  # fmt: skip
    """Run the tool on a tiny run of two ranks; exit code and what it said."""
    cfg = tiny_run(folder, workers=2, images=steps * BATCH, checkpoint_images=SAVE * BATCH)
    cfg.cluster.max_failures = 200
    cfg.cluster.hang_s = 10
    (folder / "config.yaml").write_text(dump(cfg))
    (folder / "plan.yaml").write_text(yaml.safe_dump({"seed": 1} | plan))
    command = [*enter, str(Path(sys.executable).with_name("diffussm")), "chaos", str(folder / "config.yaml")]
    command += ["--plan", str(folder / "plan.yaml"), *(f"{key}={value}" for key, value in overrides.items())]
    with (folder / "log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=MANY_S, check=False).returncode
    said = (folder / "log").read_text()
    print(said)
    return code, said


def at(step: int) -> int:
    return step * BATCH


def survived(said: str) -> dict[str, tuple[int, int]]:
    """Survived and tried of each row of the table."""
    rows = re.findall(r"^\| (\S+) \| (\d+) of (\d+) \|", said, re.MULTILINE)
    return {name: (int(good), int(tried)) for name, good, tried in rows}


@pytest.mark.timeout(TIMEOUT_S)
def test_processes_memory_warnings_and_the_head(tmp_path: Path, s3_server: S3Server) -> None:
    """Three times a fault falls into the recovery from another; the store is away while checkpoints are written.

    The training goes on while the store is away, and no fault can be made then: the next ones come a good deal later.
    """
    store = tmp_path / "store.pid"
    store.write_text(str(s3_server.process.pid))
    faults = [
        {"fault": "kill-rank", "at_images": at(50), "rank": 0},
        {"fault": "kill-rank", "after_s": 3, "rank": 0},
        {"fault": "warn", "after_s": 3, "for_s": 30},
        {"fault": "stop-rank", "at_images": at(120), "for_s": 3},
        {"fault": "stop-process", "at_images": at(150), "pid_file": str(store), "for_s": 8},
        {"fault": "slow-process", "at_images": at(400), "pid_file": str(store), "for_s": 5},
        {"fault": "limit-memory", "at_images": at(650)},
        {"fault": "stop-process", "at_images": at(700), "pid_file": str(store), "for_s": 8},
        {"fault": "kill-rank", "after_s": 2},
        {"fault": "warn", "at_images": at(950), "for_s": 30},
        {"fault": "warn", "at_images": at(1000), "for_s": 0.05},
        {"fault": "kill-node", "at_images": at(1050)},
    ]
    code, said = chaos(tmp_path, {"faults": faults}, steps=1200, storage=s3_server.url("chaos"))
    assert code == 0, said[-4000:]
    assert "12 of 12 faults made" in said
    assert "identical: samples and losses of all 1200 lines" in said
    saves = said.partition("chaos: stop-process")[2].partition("chaos: slow-process")[0]
    waited_s = [float(each) for each in re.findall(r"^\S+ saved: .* seconds ([\d.]+)", saves, re.MULTILINE)]
    assert max(waited_s) > 4, "no checkpoint was being written while the store was away"
    tried = {"kill-rank": 3, "warn": 3, "stop-rank": 1, "stop-process": 2, "limit-memory": 1, "kill-node": 1}
    tried |= {"slow-process": 1, "all": 12}
    assert survived(said) == {name: (count, count) for name, count in tried.items()}


@pytest.mark.timeout(TIMEOUT_S)
def test_a_rank_that_runs_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is wide enough, and glibc told so, that every tensor of a step is mapped anew and meets the limit."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    faults = [{"fault": "limit-memory", "at_images": at(60), "rank": 1}]
    code, said = chaos(tmp_path, {"faults": faults}, steps=150, **{"model.width": 512})
    assert code == 0, said[-4000:]
    assert survived(said) == {"limit-memory": (1, 1)}
    assert "identical: samples and losses of all 150 lines" in said
    summary = tmp_path / "runs" / "tiny-chaos" / "attempts" / "1" / "postmortem" / "summary.json"
    found = json.loads(summary.read_text())
    assert (found["cause"], found["rank"]) == ("out of memory", 1)


@pytest.mark.timeout(TIMEOUT_S)
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """Once between two checkpoints, once until a checkpoint and its next tries have failed."""
    with small_disk(tmp_path / "disk", 256 << 20) as disk:
        faults = [
            {"fault": "fill-disk", "at_images": at(45), "folder": str(disk), "for_s": 0.2},
            {"fault": "fill-disk", "at_images": at(95), "folder": str(disk), "for_s": 6},
        ]
        code, said = chaos(tmp_path, {"faults": faults}, steps=300, storage=disk)
    assert code == 0, said[-4000:]
    assert survived(said) == {"fill-disk": (2, 2)}


@pytest.fixture
def namespaces() -> None:
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}")


@pytest.fixture
def spaces(tmp_path: Path, namespaces: None) -> Iterator[Spaces]:
    with Spaces(tmp_path, workers=2) as cluster:
        yield cluster


@pytest.mark.timeout(TIMEOUT_S)
def test_a_node_that_is_cut_off_for_a_while_and_one_for_ever(spaces: Spaces, tmp_path: Path) -> None:
    faults = [
        {"fault": "cut-network", "at_images": at(60), "rank": 1, "device": "eth0", "for_s": 5},
        {"fault": "cut-network", "at_images": at(240), "rank": 1, "device": "eth0"},
    ]
    elastic = {"cluster.min_workers": 1, "cluster.address": spaces.address}
    code, said = chaos(tmp_path, {"faults": faults}, steps=400, enter=spaces.enter, **elastic)
    assert code == 0, said[-4000:]
    assert "2 of 2 faults made" in said
    assert "identical" in said


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.usefixtures("namespaces")
def test_ranks_on_other_hosts_are_hit_through_ray(tmp_path: Path) -> None:
    """The tool's host holds no rank; the last node is lost for ever, and the run ends on the other one."""
    faults = [
        {"fault": "stop-rank", "at_images": at(40), "rank": 1, "for_s": 3},
        {"fault": "kill-rank", "at_images": at(80), "rank": 0},
        {"fault": "cut-network", "at_images": at(140), "rank": 0, "device": "eth0", "for_s": 4},
        {"fault": "kill-node", "at_images": at(240), "rank": 1},
    ]
    with Spaces(tmp_path, workers=2, hosts=True) as cluster:
        elastic = {"cluster.min_workers": 1, "cluster.address": cluster.address}
        code, said = chaos(tmp_path, {"faults": faults}, steps=400, enter=cluster.enter, **elastic)
    assert code == 0, said[-4000:]
    assert "4 of 4 faults made" in said
    assert survived(said)["all"] == (4, 4)
    assert "identical" in said
    assert "NOT UNDONE" not in said
    (cut_at,) = re.findall(r"chaos: cut-network rank 0 at ([\d,]+) images", said)
    near = [line for line in _lines(tmp_path) if 0 <= line["images"] - int(cut_at.replace(",", "")) <= at(80)]
    pauses = [after["time"] - before["time"] for before, after in itertools.pairwise(near)]
    assert max(pauses) > 3, "nothing stood still while the link was down"
    hosts = {
        place["host"]
        for file in (tmp_path / "runs" / "tiny-chaos").glob("attempts/*/ranks.json")
        for place in json.loads(file.read_text()).values()
    }
    assert hosts == {"n0", "n1"}


def _lines(folder: Path) -> list[dict[str, Any]]:
    journal = folder / "runs" / "tiny-chaos" / "metrics.jsonl"
    return [json.loads(line) for line in journal.read_text().splitlines()]


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.usefixtures("namespaces")
def test_the_head_of_several_nodes_is_lost(tmp_path: Path) -> None:
    """Nobody is left to restart anything: the driver asks to be started again, and goes on in a new cluster."""
    cfg = tiny_run(tmp_path, workers=2, images=at(400), checkpoint_images=at(SAVE))
    (tmp_path / "config.yaml").write_text(dump(cfg))

    def drive(name: str, *more: str, enter: tuple[str, ...] = ()) -> list[str]:
        driver = [sys.executable, "-P", "-m", "cluster.driver", "--only", "train", str(tmp_path / "config.yaml")]
        return [*enter, *driver, f"name={name}", *more]

    subprocess.run(drive("calm"), check=True, timeout=600)
    lost = replace(cfg, name="lost")
    with Spaces(tmp_path, workers=2) as cluster:
        job = subprocess.Popen(drive("lost", f"cluster.address={cluster.address}", enter=cluster.enter))
        try:
            journal = Path(lost.storage, "lost", "metrics.jsonl")
            while not journal.exists() or len(metrics(lost)) < 100:
                assert job.poll() is None
                time.sleep(0.1)
            before = metrics(lost)[-1]["attempt"]
            cluster.lose_head()
            code = job.wait(300)
        finally:
            if job.poll() is None:
                kill_tree(job.pid)
    assert code == ExitCode.INFRASTRUCTURE
    with Spaces(tmp_path, workers=2) as cluster:
        again = drive("lost", f"cluster.address={cluster.address}", enter=cluster.enter)
        subprocess.run(again, check=True, timeout=600)
    result = compare(metrics(replace(cfg, name="calm")), metrics(lost))
    assert result.bit_equal, str(result)
    assert metrics(lost)[-1]["attempt"] > before


@pytest.mark.timeout(MANY_S)
@pytest.mark.parametrize("count", [8, 50, 100])
def test_random_faults_of_many_kinds(tmp_path: Path, s3_server: S3Server, count: int) -> None:
    """A hundred take some 40 minutes on two cores, fifty 20; tables are for docs/benchmarks.md. Eight are a first try.

    The last quarter of the steps is for faults that had to wait for the recovery from others.
    """
    store, steps = tmp_path / "store.pid", 30 * count
    store.write_text(str(s3_server.process.pid))
    kinds = [
        {"fault": "kill-rank", "weight": 6},
        {"fault": "kill-rank", "after_s": [0, 8], "weight": 2},
        {"fault": "stop-rank", "for_s": [1, 5], "weight": 3},
        {"fault": "stop-rank", "weight": 1},
        {"fault": "warn", "for_s": 30, "weight": 2},
        {"fault": "warn", "for_s": [0.01, 0.2], "weight": 1},
        {"fault": "stop-process", "pid_file": str(store), "for_s": [1, 8], "weight": 2},
        {"fault": "stop-process", "pid_file": str(store), "for_s": [1, 8], "after_s": [0, 8], "weight": 1},
        {"fault": "kill-node", "weight": 2},
    ]
    plan = {"seed": count, "random": {"faults": count, "at_images": [at(20), at(steps * 3 // 4)], "kinds": kinds}}
    code, said = chaos(tmp_path, plan, steps=steps, storage=s3_server.url(f"random-{count}"))
    assert code == 0, said[-4000:]
    assert f"{count} of {count} faults made" in said
    assert f"identical: samples and losses of all {steps} lines" in said
    assert survived(said)["all"] == (count, count)
