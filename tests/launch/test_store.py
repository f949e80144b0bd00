"""Questions to the store go to another process, whose refusals come back as typed errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diffussm.errors import StorageError
from launch import local, store


def test_an_answer_is_plain_data(tmp_path: Path) -> None:
    assert store.ask("list", str(tmp_path)) == []
    assert store.ask("status", str(tmp_path / "absent"))["found"] is False


def test_a_refusal_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        store.ask("check", str(tmp_path / "file" / "run"), str(tmp_path))
    with pytest.raises(StorageError, match="allowed: status, config, list, check"):
        store.ask("nothing")


def test_a_store_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PATIENCE_S", 0.1)
    monkeypatch.setattr(local, "module", lambda _: [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(StorageError, match=r"s3://b: no answer within 0\.1 s"):
        store.ask("status", "s3://b")
