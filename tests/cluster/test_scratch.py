"""Local folders of ranks: there while the rank lives, gone after it, however it ended."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from cluster.scratch import PREFIX, scratch, sweep

HOLDER = """
import sys, pathlib
from cluster.scratch import scratch
with scratch(pathlib.Path(sys.argv[1])) as folder:
    (folder / "shard").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_it_is_there_in_the_block_and_gone_after_it(tmp_path: Path) -> None:
    with scratch(tmp_path) as folder:
        (folder / "stacks.txt").write_text("x")
        assert folder.name.startswith(PREFIX)
        assert sweep(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_killed_ranks_folder_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    killed, living = holders
    folders = [Path(each.stdout.readline().strip()) for each in holders if each.stdout]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert folders[0].exists(), "nobody has removed it yet"
    with scratch(tmp_path):
        assert not folders[0].exists()
        assert (folders[1] / "shard").exists()
    living.communicate(timeout=60)
    assert living.returncode == 0
    assert list(tmp_path.iterdir()) == []
