"""What watching costs is measured on a real worker's place in Ray."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


@pytest.mark.long
def test_the_cost_of_heartbeats_phases_and_the_ledger_is_told() -> None:
    command = [sys.executable, "-m", "cluster.chaos.beats", "--seconds", "1", "--interval", "0.1"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
    found = re.search(
        r"each 0.1 s: (\S+)% of one core \((\S+)% to (\S+)%\); phases: (\d+) us a step; ledger: (\S+) ms", said
    )
    assert found, said
    share, low, high, phases, line = map(float, found.groups())
    assert low <= share <= high
    assert phases > 0
    assert line > 0
