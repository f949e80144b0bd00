"""A run with checkpoints to be evaluated: one rank trains a few steps in a process of its own, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffussm.checkpoint.store import LocalStore
from diffussm.config import dump
from diffussm.config.schema import Config
from tests.distributed import run_on_ranks
from tests.runs import BATCH, no_save_overtaken, tiny_run

EXTRACTOR = "tests.diffussm.evaluate.test_custom:Channels"


def scored_run(folder: Path, *, images: int = 8 * BATCH, **settings: Any) -> Config:
    """A trained run of `images` images with a checkpoint each 2 batches, whose evaluation takes a second."""
    cfg = tiny_run(folder, images=images, checkpoint_images=2 * BATCH)
    cfg.checkpoint.keep = 9
    cfg.sample.batch, cfg.sample.guidance = 3, 1.5
    cfg.evaluate.images, cfg.evaluate.block_images, cfg.evaluate.extractor = 24, 5, EXTRACTOR
    for key, value in settings.items():
        setattr(cfg.evaluate, key, value)
    run_on_ranks(Path(__file__), "train_alone", {"cfg": cfg, "scratch": folder}, 1)
    store = LocalStore(f"{cfg.storage}/{cfg.name}")
    store.write("config.yaml", dump(cfg).encode())
    return cfg


def train_alone(cfg: Config, scratch: Path) -> None:
    import torch

    from diffussm.train.loop import train
    from diffussm.train.world import current

    with no_save_overtaken():
        train(cfg, current(torch.device("cpu")), 1, scratch, lambda record: None)


def results(cfg: Config) -> dict[str, Any]:
    """The run's results by key, as plain data."""
    store = LocalStore(f"{cfg.storage}/{cfg.name}")
    keys = [key for key in store.keys("evaluations/0") if key.endswith(".json")]
    return {key: json.loads(store.read(key)) for key in keys}


def agreed(result: dict[str, Any]) -> dict[str, Any]:
    """What two evaluations of one plan must agree in: all but the times."""
    return {key: value for key, value in result.items() if key != "times"}
