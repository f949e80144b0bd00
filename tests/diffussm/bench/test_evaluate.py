from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffussm.config import dump
from tests.evaluations import EXTRACTOR
from tests.runs import tiny_run


def test_the_command_measures_workers_stages_and_neighbours(tmp_path: Path) -> None:
    """In a process of its own, with processes below it."""
    cfg = tiny_run(tmp_path)
    cfg.evaluate.extractor, cfg.sample.batch = EXTRACTOR, 3
    (config := tmp_path / "tiny.yaml").write_text(dump(cfg))
    (scratch := tmp_path / "scratch").mkdir()
    command = [
        sys.executable, "-m", "diffussm.bench", "evaluate", str(config), "--images", "10", "--rounds", "2",
        "--manifold", "40,60,8", "--url", str(scratch), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    first, *rows, last = json.loads(done.stdout)["rows"]
    assert (first["what"], first["images"]) == ("reference, once", 40)
    stages = ["blocks", "sampling", "decoding", "extraction", "store", "metrics, by one"]
    assert [(row["workers"], row["what"]) for row in rows] == [(n, stage) for n in (1, 2) for stage in stages]
    for row in rows:
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
    for blocks, *parts, _ in (rows[:6], rows[6:]):
        assert blocks["images_per_s"] == pytest.approx(10 / blocks["seconds"])
        assert 0.3 < sum(part["share"] for part in parts) <= 1.001  # the rest is waiting
        assert blocks["cpu_s"] > 0
    assert rows[0]["over_one"] == 1
    assert last["what"] == "precision and recall, 60 x 40 x 8"
    assert min(last["seconds"], last["cpu_s"]) > 0
    assert not list(scratch.iterdir())
