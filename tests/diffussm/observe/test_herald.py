from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffussm.checkpoint.store import NotFound, Store, open_store
from diffussm.config.schema import Config, ObserveConfig, TrainConfig, WandbMode
from diffussm.observe import herald
from diffussm.observe.events import DRIVER
from diffussm.observe.herald import Herald
from diffussm.observe.log import Narrator
from tests.wandb_files import history

PROGRESS = {
    "kind": "progress", "images": 8, "total": 80, "loss": 1.5, "grad_norm": 1.0, "lr": 1e-4, "images_per_s": 5.0,
    "nonfinite_steps": 0, "attempt": 2,
}  # fmt: skip


def config(tmp_path: Path, **observe: Any) -> Config:
    return Config(
        name="r", storage=str(tmp_path), train=TrainConfig(images=80), observe=ObserveConfig(**observe)
    )  # fmt: skip


def test_a_start_is_told_to_a_person_journals_and_services(tmp_path: Path) -> None:
    cfg, stream = config(tmp_path, wandb=WandbMode.offline, tensorboard=True), io.StringIO()
    store = open_store(str(tmp_path / "r"))
    start = Herald(cfg, store, Narrator(stream), {"train": {"lr": 1e-4}})
    start.hear(PROGRESS)
    start.hear({"kind": "event", "event": "saved", "images": 8, "stored": True, "attempt": 2})
    start.hear({"kind": "event", "event": "hang", "reason": "rank 3"})
    start.close(120)
    assert "loss 1.5" in stream.getvalue()
    assert "hang: reason rank 3" in stream.getvalue()
    lines = [json.loads(line) for line in store.read(DRIVER).splitlines()]
    assert [(line["event"], line["attempt"]) for line in lines] == [("hang", 2)]  # rank 0 writes its own
    (file,) = (tmp_path / "r").glob("wandb/offline-run-*/*.wandb")
    assert [(row["images"], row["loss"]) for row in history(file)] == [(8, 1.5)]
    assert list((tmp_path / "r" / "tensorboard").iterdir())


def test_plain_journals_alone_are_a_choice(tmp_path: Path) -> None:
    start = Herald(config(tmp_path, wandb=WandbMode.disabled), open_store(str(tmp_path / "r")), Narrator(), {})
    start.hear(PROGRESS)
    start.close()
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["log.txt"]
    (line,) = (tmp_path / "r" / "log.txt").read_text().splitlines()
    assert "loss 1.5" in line


def test_all_of_an_end_shares_one_deadline(tmp_path: Path, monkeypatch: Any) -> None:
    gate, stuck = threading.Event(), threading.Event()

    class Standing(Store):
        """A bucket that reads and does not write."""

        def read(self, key: str) -> bytes:
            raise NotFound(key)

        size = read  # type: ignore[assignment]

        def keys(self, prefix: str = "") -> Iterator[str]:
            return iter(())

        def write(self, key: str, data: bytes, *, create: bool = False) -> None:
            stuck.set()
            gate.wait(60)

    class Service:
        def __init__(self, *_: object) -> None:
            """Connected."""

        def take(self, record: object) -> None:
            stuck.set()
            gate.wait(60)

        close = take

    Standing.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    monkeypatch.setattr(herald, "Wandb", Service)
    monkeypatch.setattr(herald, "TensorBoard", Service)
    stream, cfg = io.StringIO(), config(tmp_path, wandb=WandbMode.offline, tensorboard=True)
    one = Herald(cfg, Standing("s3://x"), Narrator(stream), {})  # type: ignore[abstract]
    folder = one._mirror.folder
    folder.mkdir()
    (folder / "x.wandb").write_bytes(b"one")
    one.hear(PROGRESS)
    one.hear({"kind": "event", "event": "hang", "reason": "rank 3"})
    assert stuck.wait(60)
    began = time.monotonic()
    one.close(0.5)  # five waits, each of which would last a minute
    assert 0.4 < time.monotonic() - began < 10
    assert "W&B did not finish" in stream.getvalue()
    assert "W&B's last files did not reach the bucket in time" in stream.getvalue()
    gate.set()


def test_a_new_driver_knows_the_faults_of_earlier_starts(tmp_path: Path) -> None:
    cfg, store = config(tmp_path, wandb=WandbMode.disabled), open_store(str(tmp_path / "r"))
    failure = {"event": "failure", "decision": "restart", "reason": "rank 1"}
    for attempt, cause in ((1, "worker died"), (2, "preemption")):
        first = Herald(cfg, store, Narrator(io.StringIO()), {})
        first.hear({"kind": "event", "attempt": attempt, "cause": cause} | failure)
        first.close()
    stream = io.StringIO()
    second = Herald(cfg, store, Narrator(stream), {})
    second.hear(PROGRESS)
    second.close()
    assert "faults 1  last: worker died" in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 1  # what is known is not said again
