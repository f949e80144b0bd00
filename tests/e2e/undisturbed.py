"""The run that nothing disturbed, which a run that was warned, killed or moved must equal."""

from __future__ import annotations

from pathlib import Path

import torch

from diffussm.checkpoint import restore
from diffussm.checkpoint.store import open_store
from diffussm.config import load
from diffussm.config.schema import Config
from diffussm.train import loop
from diffussm.train.world import current
from tests.distributed import run_on_ranks

NAME = "undisturbed"


def run(path: Path, scratch: Path, size: int) -> None:
    """Train the config in `path` as NAME on `size` ranks."""
    run_on_ranks(Path(__file__), "uninterrupted", {"path": str(path), "scratch": str(scratch)}, size)


def uninterrupted(path: str, scratch: str) -> None:
    """One rank of it. Collective: every rank must call it."""
    cfg = load(path, [f"name={NAME}"])
    world = current(torch.device("cpu"))
    loop.train(cfg, world, attempt=1, scratch=Path(scratch) / str(world.rank), announce=lambda record: None)


def state(cfg: Config, name: str) -> dict[str, torch.Tensor]:
    """Weights, moments and averages of a run's last checkpoint, which must be that of the last image."""
    store = open_store(f"{cfg.storage}/{name}")
    folder, manifest = restore.choose(store)
    assert manifest.counters.images == cfg.train.images
    return {
        f"{kind}/{key}": tensor
        for kind in manifest.kinds
        for key, tensor in restore.read_weights(store, folder, manifest, kind).items()
    }
