"""Submissions for the tests of this folder, and KubeRay's own definitions where they are at hand."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffussm.config.schema import Config, DataConfig, TrainConfig
from launch.target import Submission

DEFINITIONS = os.environ.get("KUBERAY_CRDS", "")
"""Folder with KubeRay's CustomResourceDefinitions (its helm chart's crds/), if somebody has it."""


def submission(**kubernetes: Any) -> Submission:
    """Two nodes of four GPUs, everything in buckets."""
    cfg = Config(name="a-run", storage="s3://bucket/runs", data=DataConfig(latents="s3://bucket/latents"))
    cfg.train = TrainConfig(images=1_000, global_batch=64)
    cfg.cluster.workers, cfg.cluster.workers_per_node, cfg.cluster.gpus_per_worker = 8, 4, 1
    cfg.cluster.cpus_per_worker = 6
    cfg.kubernetes.image = "registry.example.com/diffussm:1"
    for key, value in kubernetes.items():
        setattr(cfg.kubernetes, key, value)
    return Submission(cfg, config="name: a-run\n")


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    return loaded


def found(plural: str) -> dict[str, Any] | None:
    """KubeRay's definition of `rayjobs` or `rayclusters`, if it is at hand."""
    path = Path(DEFINITIONS) / f"ray.io_{plural}.yaml"
    return _read(path) if DEFINITIONS and path.is_file() else None


def definition(plural: str) -> dict[str, Any]:
    """As `found`; skips the test where it is not at hand."""
    loaded = found(plural)
    if loaded is None:
        pytest.skip("KUBERAY_CRDS does not name a folder with KubeRay's definitions")
    return loaded
