"""The tool `diffussm chaos` on whole runs with a real S3 server, and on nodes whose links can be cut. Minutes each."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffussm.config import dump
from tests.chaos.spaces import NEEDED, Spaces
from tests.runs import BATCH, tiny_run
from tests.s3 import S3Server

pytestmark = pytest.mark.long

SAVE = 20
TIMEOUT_S = 1500


def chaos(
    folder: Path, faults: list[dict[str, Any]], *, steps: int, enter: tuple[str, ...] = (), **overrides: object
) -> tuple[int, str]:  # fmt: skip
    """Run the tool on a tiny run of two ranks; exit code and what it said."""
    cfg = tiny_run(folder, workers=2, images=steps * BATCH, checkpoint_images=SAVE * BATCH)
    cfg.cluster.max_failures = 50
    cfg.cluster.hang_s = 10
    (folder / "config.yaml").write_text(dump(cfg))
    (folder / "plan.yaml").write_text(yaml.safe_dump({"seed": 1, "faults": faults}))
    command = [*enter, str(Path(sys.executable).with_name("diffussm")), "chaos", str(folder / "config.yaml")]
    command += ["--plan", str(folder / "plan.yaml"), *(f"{key}={value}" for key, value in overrides.items())]
    with (folder / "log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=TIMEOUT_S, check=False).returncode
    said = (folder / "log").read_text()
    print(said)
    return code, said


def at(step: int) -> int:
    return step * BATCH


@pytest.mark.timeout(TIMEOUT_S)
def test_processes_memory_warnings_and_the_head(tmp_path: Path, s3_server: S3Server) -> None:
    """Two faults may fall into one recovery: their images are random."""
    store = tmp_path / "store.pid"
    store.write_text(str(s3_server.process.pid))
    faults = [
        {"fault": "kill-rank", "at_images": [at(30), at(300)], "times": 3},
        {"fault": "stop-rank", "at_images": at(120), "for_s": 3},
        {"fault": "stop-process", "at_images": at(150), "pid_file": str(store), "for_s": 8},
        {"fault": "limit-memory", "at_images": at(180)},
        {"fault": "warn", "at_images": at(220), "for_s": 30},
        {"fault": "warn", "at_images": at(260), "for_s": 0.05},
        {"fault": "kill-node", "at_images": at(340)},
    ]
    code, said = chaos(tmp_path, faults, steps=400, storage=s3_server.url("chaos"))
    assert code == 0, said[-4000:]
    assert "9 of 9 faults made" in said
    assert "identical: samples and losses of all 400 lines" in said
    for kind in ("kill-rank", "stop-rank", "stop-process", "warn", "kill-node"):
        row = re.search(rf"\| {kind} \| (\d+) of (\d+) ", said)
        assert row, kind
        assert row[1] == row[2], row[0]


@pytest.fixture
def spaces(tmp_path: Path) -> Iterator[Spaces]:
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}")
    with Spaces(tmp_path, workers=2) as cluster:
        yield cluster


@pytest.mark.timeout(TIMEOUT_S)
def test_a_node_that_is_cut_off_for_a_while_and_one_for_ever(spaces: Spaces, tmp_path: Path) -> None:
    faults = [
        {"fault": "cut-network", "at_images": at(60), "rank": 1, "device": "eth0", "for_s": 5},
        {"fault": "cut-network", "at_images": at(240), "rank": 1, "device": "eth0"},
    ]
    elastic = {"cluster.min_workers": 1, "cluster.address": spaces.address}
    code, said = chaos(tmp_path, faults, steps=400, enter=spaces.enter, **elastic)
    assert code == 0, said[-4000:]
    assert "2 of 2 faults made" in said
    assert "identical" in said


@pytest.mark.timeout(3600)
def test_many_random_faults(tmp_path: Path, s3_server: S3Server) -> None:
    """Its table is the one in docs/benchmarks.md."""
    faults = [{"fault": "kill-rank", "at_images": [at(20), at(1900)], "times": 20}]
    code, said = chaos(tmp_path, faults, steps=2000, storage=s3_server.url("many"))
    assert code == 0, said[-4000:]
    assert "identical: samples and losses of all 2000 lines" in said
