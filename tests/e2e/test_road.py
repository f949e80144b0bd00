"""The whole road as a user walks it: the command line, a real Ray cluster of two workers, a kill, a resume, a score."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffussm.config import dump, load
from tests.runs import BATCH, final_losses, tiny_run

STEPS = 30
WAIT_S = 150


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config file whose latents are not made yet."""
    cfg = tiny_run(tmp_path, workers=2, images=STEPS * BATCH, checkpoint_images=5 * BATCH)
    # Every checkpoint but the last before the end may be gone before its weights are copied: that one stays to the end.
    cfg.sample.every_images = (STEPS - 5) * BATCH
    shutil.rmtree(tmp_path / "latents")
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(cfg))
    return path


def diffussm(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("diffussm")), *arguments]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert process.poll() is None, f"ended with {process.returncode}\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"waited {WAIT_S} s\n{log.read_text()[-3000:]}"
        time.sleep(0.05)
    return value


def events(root: Path) -> list[dict[str, Any]]:
    path = root / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_prepare_train_kill_resume_sample_evaluate(config: Path, tmp_path: Path) -> None:
    log, root = tmp_path / "log", tmp_path / "runs" / "tiny"

    prepare = diffussm("prepare", str(config), log=log)
    assert prepare.wait(WAIT_S) == 0, log.read_text()
    assert (tmp_path / "latents" / "passport.json").exists()

    # The whole process group dies in the middle, as when a machine does; Ray's own processes follow their driver.
    first = diffussm("train", str(config), log=log)
    wait_for(lambda: any(e["event"] == "saved" for e in events(root)), first, log)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    saved = max(e["images"] for e in events(root) if e["event"] == "saved")

    second = diffussm("train", str(config), log=log)
    resumed = wait_for(lambda: [e for e in events(root) if e["event"] == "resumed"], second, log)
    assert resumed[0]["images"] >= saved
    assert second.wait(WAIT_S) == 0, log.read_text()

    losses = final_losses(load(config))
    assert sorted(losses) == [step * BATCH for step in range(1, STEPS + 1)]
    summary = json.loads((root / "summary.json").read_text())
    assert summary["images"] == STEPS * BATCH
    assert "FD-EffLite0 = " in summary["score"]
    assert Image.open(summary["samples"]).size[0] > 50
    grids = sorted(path.name for path in (root / "samples").glob("*.png"))
    beside = (STEPS - 5) * BATCH  # unless the kill came so late that the first start had passed it
    expected = [beside, STEPS * BATCH] if resumed[0]["images"] < beside else [STEPS * BATCH]
    assert set(grids) >= {f"{images:012d}.png" for images in expected}
    assert not list((root / "samples").glob("pending/*"))
    assert len(list((root / "checkpoints").iterdir())) == 2
    assert {int(path.name) for path in (root / "attempts").iterdir()} == {1, 2}

    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file())
    again = diffussm("train", str(config), log=log)
    assert again.wait(WAIT_S) == 0
    assert "is finished" in log.read_text()
    assert before == sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file())

    grid, array = tmp_path / "cats.png", tmp_path / "cats.npz"
    asked = ["--classes", "cat", "--grid", str(grid), "--npz", str(array), "--seed", "3"]
    sample = diffussm("sample", str(root), *asked, log=log)
    assert sample.wait(WAIT_S) == 0, log.read_text()
    assert Image.open(grid).format == "PNG"
    assert np.load(array, allow_pickle=False)["arr_0"].shape == (2, 8, 8, 3)

    strip = diffussm("sample", str(root), "--strip", "trajectory", "--classes", "dog", log=log)
    assert strip.wait(WAIT_S) == 0, log.read_text()
    assert Image.open(next((root / "samples").glob("*-trajectory.png"))).format == "PNG"

    refused = diffussm("train", str(config), "seed=8", "train.images=999", log=log)
    assert refused.wait(WAIT_S) == 64
    assert "seed: the run has 7, asked was 8" in log.read_text()
