from __future__ import annotations

from pathlib import Path

import pytest

from diffussm.checkpoint.store import Store, open_store
from diffussm.errors import StorageError
from diffussm.observe.mirror import Mirror
from tests.s3 import S3Server


def test_a_run_that_is_a_folder_is_written_in_place(tmp_path: Path) -> None:
    mirror = Mirror(open_store(str(tmp_path / "run")), "tensorboard", tmp_path / "scratch")
    assert mirror.folder == tmp_path / "run" / "tensorboard"
    mirror.push()


def test_files_that_grow_are_kept_in_the_bucket(tmp_path: Path, s3_server: S3Server) -> None:
    store = open_store(s3_server.url("mirror"))
    mirror = Mirror(store, "wandb", tmp_path)
    (mirror.folder / "offline-run").mkdir(parents=True)
    file = mirror.folder / "offline-run" / "x.wandb"
    file.write_bytes(b"one")
    (mirror.folder / "latest").symlink_to(mirror.folder / "offline-run")
    mirror.push()
    file.write_bytes(b"one, two")
    mirror.push()
    assert list(store.keys("")) == ["wandb/offline-run/x.wandb"]
    assert store.read("wandb/offline-run/x.wandb") == b"one, two"


def test_an_upload_that_fails_is_told_and_done_with_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content: dict[str, bytes] = {}

    class Away(Store):
        away = True

        def write(self, key: str, data: bytes, *, create: bool = False) -> None:
            if self.away:
                raise StorageError("store away")
            content[key] = data

    Away.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    store = Away("s3://x")  # type: ignore[abstract]
    mirror = Mirror(store, "wandb", tmp_path)
    mirror.folder.mkdir()
    (mirror.folder / "x.wandb").write_bytes(b"one")
    mirror.try_push()
    assert "store away" in caplog.text
    store.away = False
    mirror.try_push()
    assert content == {"wandb/x.wandb": b"one"}
