"""A run small enough for a test: 40 pictures, an untrained autoencoder, a two-block network."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffussm.config.schema import (
    CheckpointConfig,
    ClusterConfig,
    Config,
    EvaluateConfig,
    ModelConfig,
    ObserveConfig,
    Precision,
    SampleConfig,
    TrainConfig,
    WandbMode,
)  # fmt: skip
from diffussm.data.encode import prepare
from tests.diffussm.data import sets

BATCH = 8


def tiny_run(
    folder: Path, *, workers: int = 1, images: int = 20 * BATCH, checkpoint_images: int = 6 * BATCH, **train: Any
) -> Config:  # fmt: skip
    """A checked-in-spirit config whose latents exist in `folder`; its run lies below `folder/runs`."""
    pictures, autoencoder = folder / "pictures", folder / "autoencoder"
    if not pictures.exists():
        sets.picture_folder(pictures, {"cat": 20, "dog": 20})
        sets.tiny_autoencoder(autoencoder)
    cfg = sets.config(str(folder / "latents"), pictures, autoencoder, shard_bytes=1 << 16)
    cfg.name, cfg.storage, cfg.seed = "tiny", str(folder / "runs"), 7
    cfg.model = ModelConfig(preset="tiny", width=16, depth=2, state=8, backend="torch")
    settings: dict[str, Any] = {
        "lr": 1e-3,
        "zero_stage": 1,
        "precision": Precision.fp32,
        "ema": 0.99,
        "power_ema": [0.05, 0.1],
        "ema_snapshot_images": 10 * BATCH,
    }
    settings |= {"log_images": BATCH}
    cfg.train = TrainConfig(images=images, global_batch=BATCH, **(settings | train))
    cfg.checkpoint = CheckpointConfig(every_images=checkpoint_images)
    cfg.cluster = ClusterConfig(workers=workers)
    cfg.sample = SampleConfig(steps=4, per_class=2, guidance_channels=0)
    cfg.evaluate = EvaluateConfig(images=4)
    cfg.observe = ObserveConfig(wandb=WandbMode.disabled)
    prepare(cfg)
    return cfg


def metrics(cfg: Config) -> list[dict[str, Any]]:
    """The lines of the run's metrics.jsonl."""
    lines = (Path(cfg.storage) / cfg.name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def final_losses(cfg: Config) -> dict[int, float]:
    """Loss by images; where steps were replayed, the last attempt's."""
    return {record["images"]: record["loss"] for record in metrics(cfg)}


@contextlib.contextmanager
def no_save_overtaken() -> Iterator[None]:
    """Each save ends before the next step begins, for a test that needs every checkpoint of its run.

    A step of this run takes milliseconds, and on a busy machine the next save comes due while one is still under way;
    training skips it then.
    """
    from diffussm.checkpoint.inflight import InFlight

    begin = InFlight.__init__

    def begin_and_wait(self: InFlight, *args: Any) -> None:
        begin(self, *args)
        self.wait(None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InFlight, "__init__", begin_and_wait)
        yield
