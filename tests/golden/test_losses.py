"""Twenty steps whose losses are kept: a change that should not alter the numbers proves here that it does not.

Written anew, after a change that should, by `python -m tests.golden.test_losses`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffussm.train import loop
from diffussm.train.world import current
from tests.runs import BATCH, final_losses, tiny_run

GOLDEN = Path(__file__).with_name("losses.json")
TOLERANCE = 2e-5
"""Relative. Processors with other vector units round differently; on one machine the losses are equal bit by bit."""


def measure(tmp_path: Path) -> list[float]:
    cfg = tiny_run(tmp_path)
    loop.train(cfg, current(torch.device("cpu")), 1, tmp_path / "scratch", announce=lambda record: None)
    losses = final_losses(cfg)
    return [losses[images] for images in sorted(losses)]


@pytest.mark.world_size(1)
def test_twenty_steps_give_the_losses_they_always_gave(tmp_path: Path) -> None:
    found, expected = measure(tmp_path), json.loads(GOLDEN.read_text())
    assert len(expected) == 160 // BATCH
    assert found == pytest.approx(expected, rel=TOLERANCE)


def write(tmp_path: Path) -> None:
    """Store the losses of this code as the new golden ones."""
    GOLDEN.write_text(json.dumps(measure(tmp_path), indent=1) + "\n")


if __name__ == "__main__":
    import tempfile

    from tests.distributed import run_on_ranks

    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(Path(__file__), "write", {"tmp_path": Path(folder)}, 1)
    print(GOLDEN.read_text())
