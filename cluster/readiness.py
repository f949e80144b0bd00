"""What a start looks at before any work: whatever can be known to fail later fails now."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from diffussm.checkpoint.store import NotFound, Store
from diffussm.config import dump
from diffussm.config.frozen import check_frozen
from diffussm.config.schema import Config
from diffussm.errors import ConfigError, MissingError
from diffussm.model.presets import resolve
from diffussm.naming import RunPaths

if TYPE_CHECKING:
    from diffussm.data.passport import Passport

DISK_BYTES = 1 << 30
"""Least room for Ray's notes and a start's scratch."""


def check_start(cfg: Config, store: Store) -> None:
    """Before any work: whatever can be known to fail later fails now.

    Raises:
        StorageError: the run's place cannot be written.
        ConfigError: a frozen key differs from the run's; an unknown preset, operator backend or extractor.
        MissingError: GPUs, the extractor's weights, or room for Ray's and the ranks' own files are not there.
        DataError: the run to start from has no such checkpoint.
    """
    import torch

    from diffussm.evaluate.extractors import open_extractor
    from diffussm.ops import registry
    from diffussm.train import lineage

    resolve(cfg.model)
    if cfg.model.backend != registry.AUTO:
        registry.get(cfg.model.backend)
    if cfg.evaluate.enabled or cfg.evaluate.every_images:
        open_extractor(cfg.evaluate.extractor, weights=cfg.evaluate.weights)
    wanted, there = cfg.cluster.workers * cfg.cluster.gpus_per_worker, torch.cuda.device_count()
    if not cfg.cluster.address and wanted > there:
        raise MissingError(
            f"cluster: {cfg.cluster.workers} workers with gpus_per_worker={cfg.cluster.gpus_per_worker:g} need "
            f"{wanted:g} GPUs; this machine has {there}",
            "set cluster.gpus_per_worker=0 to train on the CPU, or cluster.address to use a Ray cluster",
        )
    if not cfg.cluster.address:  # a cluster's nodes are looked at by the preflight
        check_room(Path(tempfile.gettempdir()))
    store.check_writable()
    check_run(cfg, store)
    if cfg.train.start_from and next(store.keys("checkpoints/"), None) is None:
        lineage.check(cfg.train.start_from)


def check_room(folder: Path) -> None:
    """Refuse a folder for temporary files that is all but full."""
    free = shutil.disk_usage(folder).free
    if free < DISK_BYTES:
        raise MissingError(
            f"{folder}: {free >> 20} MiB are free; wanted are {DISK_BYTES >> 20}", "make room there, or set TMPDIR"
        )


def check_run(cfg: Config, store: Store) -> None:
    """Refuse a config that differs from the run's in a frozen key, once there is a checkpoint made with it."""
    if next(store.keys("checkpoints/"), None) is None:
        return
    where = RunPaths(cfg.storage, cfg.name).config
    try:
        stored = yaml.safe_load(store.read("config.yaml"))
    except (NotFound, yaml.YAMLError) as error:
        raise ConfigError(
            f"{where}: the run has checkpoints, but its config cannot be read ({error})",
            "restore the file, or give the new run another name",
        ) from error
    check_frozen(stored, yaml.safe_load(dump(cfg)), where)


def check_guidance(cfg: Config, passport: Passport) -> None:
    """Guided channels must be channels of the latent."""
    found, allowed = cfg.sample.guidance_channels, passport.latent.channels
    if found > allowed:
        raise ConfigError(
            f"sample.guidance_channels: found {found}; the latents have {allowed} channels (0 guides all)",
            "set sample.guidance_channels=0",
        )
