from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from diffussm.checkpoint.store import open_store
from diffussm.config.schema import Config, ObserveConfig, TrainConfig, WandbMode
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
    herald = Herald(cfg, store, Narrator(stream), {"train": {"lr": 1e-4}})
    herald.hear(PROGRESS)
    herald.hear({"kind": "event", "event": "saved", "images": 8, "stored": True, "attempt": 2})
    herald.hear({"kind": "event", "event": "hang", "reason": "rank 3"})
    herald.close(120)
    assert "loss 1.5" in stream.getvalue()
    assert "hang: reason rank 3" in stream.getvalue()
    lines = [json.loads(line) for line in store.read(DRIVER).splitlines()]
    assert [(line["event"], line["attempt"]) for line in lines] == [("hang", 2)]  # rank 0 writes its own
    (file,) = (tmp_path / "r").glob("wandb/offline-run-*/*.wandb")
    assert [(row["images"], row["loss"]) for row in history(file)] == [(8, 1.5)]
    assert list((tmp_path / "r" / "tensorboard").iterdir())


def test_plain_journals_alone_are_a_choice(tmp_path: Path) -> None:
    herald = Herald(config(tmp_path, wandb=WandbMode.disabled), open_store(str(tmp_path / "r")), Narrator(), {})
    herald.hear(PROGRESS)
    herald.close()
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["log.txt"]
    (line,) = (tmp_path / "r" / "log.txt").read_text().splitlines()
    assert "loss 1.5" in line
