from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_the_command_measures_saves_and_restores_of_both(tmp_path: Path) -> None:
    """In a process of its own, with processes below it."""
    command = [
        sys.executable, "-m", "diffussm.bench", "save", "--preset", "tiny", "--depth", "1", "--rounds", "1",
        "--url", str(tmp_path), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["what"].split(",")[0], row["ranks"]) for row in rows] == [
        ("step", 2), ("step", 2), ("save: stall", 2), ("save: to the manifest", 2), ("save: DeepSpeed", 2),
        ("restore", 2), ("restore: DeepSpeed", 2), ("restore", 1), ("restore: DeepSpeed's conversion", 1),
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
    assert not list(tmp_path.iterdir())
