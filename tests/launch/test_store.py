"""Questions to the store go to another process, whose refusals come back as typed errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffussm.errors import StorageError
from launch import store


def test_an_answer_is_plain_data(tmp_path: Path) -> None:
    assert store.ask("list", str(tmp_path)) == []
    assert store.ask("status", str(tmp_path / "absent"))["found"] is False


def test_a_refusal_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        store.ask("check", str(tmp_path / "file" / "run"), str(tmp_path))
    with pytest.raises(StorageError, match="allowed: status, list, check"):
        store.ask("nothing")
