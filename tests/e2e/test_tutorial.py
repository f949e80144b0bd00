"""The commands of docs/tutorial.md, in the order a newcomer comes to them, on a run that takes a minute."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diffussm.config import dump
from tests.runs import BATCH, tiny_run
from tests.test_docs import ROOT, lines_of

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

RECIPE = "configs/quickstart.yaml"
"""What every config of the document is read as; the tiny run stands for it here."""
MAKES = ("config", "prepare", "train")
NEEDS_MORE = ("doctor", "plan", "submit", "stop", "logs")
"""Look at the machine or at a scheduler; tests of their own run them."""


def commands() -> list[list[str]]:
    """Those of the recipe that need no GPU; what reads a run stands after what makes one."""
    found = [list(line.words) for line in lines_of(ROOT / "docs" / "tutorial.md") if line.whole]
    mine = [words for words in found if RECIPE in words and words[0] not in NEEDS_MORE]
    here = [words for words in mine if "cluster.gpus_per_worker=1" not in words]
    return sorted(here, key=lambda words: words[0] not in MAKES)


def test_every_command_of_the_tutorial_ends_well_in_its_order(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path, images=6 * BATCH, checkpoint_images=2 * BATCH)
    cfg.data.latents = str(tmp_path / "own-latents")
    (tmp_path / "tiny.yaml").write_text(dump(cfg))
    diffussm = Path(sys.executable).with_name("diffussm")
    walked = []
    for words in commands():
        here = ["tiny.yaml" if word == RECIPE else word.replace("face,heart", "cat,dog") for word in words]
        done = subprocess.run([diffussm, *here], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"diffussm {shlex.join(here)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        walked.append(words[0])
    assert {"config", "prepare", "data", "train", "status", "report", "sample", "export"} <= set(walked)
    run = tmp_path / "runs" / "tiny"
    for made in ("latents.png", "more.png", "my-pictures-diffusers/README.md"):
        assert (tmp_path / made).exists(), made
    assert (run / "report.html").exists()
    assert list((run / "samples").glob("*-trajectory.png"))
