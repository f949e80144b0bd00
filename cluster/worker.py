"""What runs in each Ray Train worker: find out who we are, then train."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
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
    from cluster.scratch import scratch
    from cluster.standby import Standby
    from diffussm.config.plan import with_workers
    from diffussm.train.control import Control
    from diffussm.train.phases import Phase

    cfg: Config = job["cfg"]
    control = Control()
    context = ray.train.get_context()
    rank = context.get_world_rank()
    with scratch() as folder:
        standby = Standby(wanted=cfg.cluster.standby)
        pulse = Pulse(job["hub"], rank, control, cfg.cluster, folder / "stacks.txt", standby)
        control.phases.book(Phase.START, max(0.0, time.time() - pulse.start()))
        try:
            from diffussm.train.loop import train
            from diffussm.train.world import current

            torch.set_num_threads(cfg.cluster.threads_per_worker)
            gpus = cfg.cluster.gpus_per_worker
            world = current(torch.device("cuda", context.get_local_rank()) if gpus else torch.device("cpu"))
            cfg = with_workers(cfg, world.size)
            attempt = claim_attempt(cfg, world)
            if world.leads:
                ray.get(job["hub"].number.remote(attempt))

            def announce(record: dict[str, Any]) -> None:
                pulse.tell(record | {"attempt": attempt})

            _tell_warnings(world.rank, announce)
            data = folder / "data"
            data.mkdir()
            train(cfg, world, attempt, data, announce, control)
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
