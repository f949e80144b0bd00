"""What `diffussm report` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffussm.checkpoint.store import open_store
from diffussm.observe.goodput import Ledger
from diffussm.observe.report import main


def test_a_run_is_told_by_its_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(open_store(str(tmp_path)), 1)
    ledger.begin(0, {"start": 2.0})
    ledger.step(8, {"start": 2.0, "forward": 6.0})
    ledger.close()
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "goodput 75.0% of 8 s in 1 start(s), 8 images" in said
    assert "step             6.0 s" in said


def test_a_run_without_a_ledger_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    assert "nothing is booked" in capsys.readouterr().out
