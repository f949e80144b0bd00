from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffussm.bench.step import Clock, main
from diffussm.config import dump
from diffussm.errors import ExitCode
from tests.runs import tiny_run


def test_an_inner_part_interrupts_the_one_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    clock.switch("a")
    clock.push("b")
    clock.pop()
    clock.switch("c")
    assert clock.take() == {"a": 1.0 + 4.0, "b": 2.0, "c": 8.0}
    assert clock.seconds == {}


@pytest.mark.long
def test_the_command_names_every_part_and_the_parts_make_up_the_step(tmp_path: Path) -> None:
    """In processes of its own, two ranks under ZeRO 1 with accumulation."""
    config = tmp_path / "tiny.yaml"
    config.write_text(dump(tiny_run(tmp_path, micro_batch=4)))
    command = [sys.executable, "-m", "diffussm.bench.step", str(config), "--steps", "2", "--ranks", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ranks"] == 2
    rows = {row["part"]: row for row in found["rows"]}
    parts = [name for name in rows if not name.startswith(("sum", "a step", "beside", "save"))]
    assert set(parts) == {
        "data: waiting for the next batch", "forward: stem", "forward: timestep", "forward: label", "forward: head",
        "forward: state space", "forward: dense layers", "forward: norms, gates, noise and loss", "backward", "reduce",
        "optimizer", "averages",
    }  # fmt: skip
    assert all(rows[name]["ms_low"] <= rows[name]["ms"] <= rows[name]["ms_high"] for name in rows)
    total = rows["sum of the parts"]
    assert sum(rows[name]["ms_low"] for name in parts) <= total["ms_high"]
    assert sum(rows[name]["ms_high"] for name in parts) >= total["ms_low"]
    assert rows["save: what one holds the step up for"]["ms"] > 0


def test_latents_that_are_not_there_are_asked_for_and_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of ImageNet they take hours."""
    cfg = tiny_run(tmp_path)
    cfg.data.latents = str(tmp_path / "none")
    config = tmp_path / "tiny.yaml"
    config.write_text(dump(cfg))
    assert main([str(config), "--steps", "1"]) == ExitCode.DATA
    assert "run `diffussm prepare` with this config" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
