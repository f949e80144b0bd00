from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from diffussm.config import dump
from tests.runs import tiny_run


def test_the_command_measures_both_loops(tmp_path: Path) -> None:
    """In a process of its own: it makes a process group and leaves variables behind."""
    config = tmp_path / "tiny.yaml"
    config.write_text(dump(tiny_run(tmp_path)))
    command = [sys.executable, "-m", "diffussm.bench", "loop", str(config), "--rounds", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["rounds"] == 2
    assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["ours_steps_per_s"] > 0
