"""The places that a config names, meant the same way by every process of a job."""

from __future__ import annotations

from pathlib import Path

from diffussm.config.schema import Config
from diffussm.config.sets import split
from diffussm.naming import absolute


def absolutely(cfg: Config) -> Config:
    """Make the local places of `cfg` absolute, since jobs and their workers start in other folders; returns `cfg`."""
    cfg.storage = absolute(cfg.storage)
    data = cfg.data
    data.latents, data.images, data.cache, data.labels = map(
        absolute, (data.latents, data.images, data.cache, data.labels)
    )
    data.more = [f"{side}={absolute(place)}" for side, place in map(split, data.more)]
    if Path(data.autoencoder).is_dir():  # else it is built in, or an id on the hub
        data.autoencoder = absolute(data.autoencoder)
    cfg.train.start_from, cfg.sample.weights = absolute(cfg.train.start_from), absolute(cfg.sample.weights)
    cfg.checkpoint.local, cfg.slurm.logs = absolute(cfg.checkpoint.local), absolute(cfg.slurm.logs)
    cfg.evaluate.weights, cfg.evaluate.reference = absolute(cfg.evaluate.weights), absolute(cfg.evaluate.reference)
    return cfg
