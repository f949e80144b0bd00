"""A sample grid from kept weights, drawn beside the training by a Ray worker of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from cluster.evaluate import WAIT_S, Stopped
from cluster.scoring import checked_passport
from diffussm.checkpoint.store import open_store
from diffussm.config.schema import Config
from diffussm.errors import DiffuSSMError
from diffussm.naming import RunPaths
from diffussm.sample import Painter, paint_grid

NICENESS = 10
"""On a machine that the training shares, the training goes first."""


class Easel:
    """The worker: one actor for each grid, so that no memory of a GPU is held between two."""

    def draw(self, cfg: Config) -> tuple[bytes, str]:
        """The grid of the weights in `sample.weights` as PNG, and the credit of the data."""
        import torch

        os.nice(NICENESS)
        torch.set_num_threads(cfg.cluster.threads_per_worker)
        passport = checked_passport(cfg)
        painter = Painter.load(cfg, open_store(RunPaths(cfg.storage, cfg.name).root), passport)
        painter.cast()
        png, _ = paint_grid(painter)
        return png, passport.credit


def draw(cfg: Config, stop: Callable[[], bool]) -> tuple[bytes, str]:
    """`Easel.draw` on a Ray worker; one that is lost is replaced, within `cluster.max_failures`.

    Raises:
        Stopped: `stop` said so meanwhile.
        DiffuSSMError and others: as the worker raised them.
    """
    import ray

    cluster = cfg.cluster
    remote: Any = ray.remote(
        num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker,
        max_restarts=cluster.max_failures, max_task_retries=cluster.max_failures,
    )  # fmt: skip
    easel = remote(Easel).remote()
    try:
        ref = easel.draw.remote(cfg)
        while not ray.wait([ref], timeout=WAIT_S)[0]:
            if stop():
                raise Stopped
        png, credit = ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, DiffuSSMError) else error from error
    finally:
        ray.kill(easel)
    return png, credit
