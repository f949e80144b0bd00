"""What runs in each Ray Train worker: find out who we are, then train."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffussm.config.schema import Config


def run(job: dict[str, Any]) -> None:
    """Train on this rank. Collective: Ray starts it on every rank.

    Args:
        job: `cfg`, the checked Config, and `hub`, the actor that knows what is asked and hears what happens.

    Imports are late: the driver that only ships this function need not pay for them.
    """
    import ray
    import ray.train
    import torch

    from cluster.lease import claim_attempt
    from cluster.pulse import Pulse
    from cluster.standby import Standby
    from diffussm.config.plan import with_workers
    from diffussm.train.control import Control
    from diffussm.train.phases import Phase

    cfg: Config = job["cfg"]
    control = Control()
    context = ray.train.get_context()
    rank = context.get_world_rank()
    pulse = Pulse(job["hub"], rank, control, cfg.cluster.heartbeat_interval_s, Standby(wanted=cfg.cluster.standby))
    control.phases.book(Phase.START, max(0.0, time.time() - pulse.start()))
    try:
        from diffussm.train.loop import train
        from diffussm.train.world import current

        torch.set_num_threads(cfg.cluster.threads_per_worker)
        device = torch.device("cuda", context.get_local_rank()) if cfg.cluster.gpus_per_worker else torch.device("cpu")
        world = current(device)
        cfg = with_workers(cfg, world.size)
        attempt = claim_attempt(cfg, world)
        if world.leads:
            ray.get(job["hub"].number.remote(attempt))

        def announce(record: dict[str, Any]) -> None:
            pulse.tell(record | {"attempt": attempt})

        _tell_warnings(world.rank, announce)
        with tempfile.TemporaryDirectory(prefix=f"{cfg.name}-{attempt}-") as scratch:
            train(cfg, world, attempt, Path(scratch), announce, control)
    finally:
        pulse.stop()


def _tell_warnings(rank: int, announce: Callable[[dict[str, Any]], None]) -> None:
    """Send our own warnings of every rank, and the operator's choice of backend on rank 0, to the driver."""

    class Teller(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            chosen = rank == 0 and record.name.startswith("diffussm.ops")
            if record.levelno >= logging.WARNING or chosen:
                line = {"event": record.levelname.lower(), "rank": rank, "said": record.getMessage()}
                announce({"kind": "event"} | line)

    logger = logging.getLogger("diffussm")
    logger.setLevel(logging.INFO)
    logger.handlers = [Teller()]
