from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from diffussm.config import dump
from tests.runs import BATCH, tiny_run


def test_the_command_measures_both_sides(tmp_path: Path) -> None:
    """In a process of its own: it makes a process group and leaves variables behind."""
    config = tmp_path / "tiny.yaml"
    config.write_text(dump(tiny_run(tmp_path, log_images=4 * BATCH)))
    command = [sys.executable, "-m", "diffussm.bench", "log", str(config), "--rounds", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    configured, every = json.loads(done.stdout)["rows"]
    assert (configured["lines"], configured["steps_a_round"]) == ("every 4 steps", 4)
    assert every["lines"] == "every step"
    for row in (configured, every):
        assert 0 < row["waited"] < 1000
        assert row["cpu_low"] <= row["cpu"] <= row["cpu_high"]
        assert row["plain_ms"] > 0
    assert every["waited"] > configured["waited"]
