"""Every environment variable we set for Ray and its workers, with its value and the reason.

They must be set before Ray starts and before any process group exists; nothing else in the code base sets variables
for workers.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from dataclasses import dataclass

from diffussm.config.schema import Config


@dataclass(frozen=True)
class Variable:
    """One environment variable."""

    name: str
    value: str
    reason: str


RANK_PROCESS = Variable(
    "DIFFUSSM_RANK_PROCESS", "1", "tells processes for ranks from others of the job: they import more"
)
"""Set for the ranks alone, not for every worker."""
WARM = "cluster.standby.warm"
"""What Ray calls first in every process it starts for the job."""


def variables(cfg: Config) -> list[Variable]:
    """What workers and driver of this run need. Pure."""
    threads = str(cfg.cluster.threads_per_worker)
    return [
        Variable("RAY_TRAIN_V2_ENABLED", "1", "the controller with failure and scaling policies"),
        Variable("RAY_CHDIR_TO_TRIAL_DIR", "0", "workers keep the driver's folder"),
        Variable("RAY_USAGE_STATS_ENABLED", "0", "a training job tells nobody about itself"),
        Variable(
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
            str(cfg.cluster.health_check_interval_s),
            "a dead worker is seen after this long; Ray's 2 s would be a fifth of a recovery",
        ),
        Variable("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0", "drains reach the ranks through our hub"),
        Variable("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30", "nodes are known to be there; Ray would wait 60 s"),
        Variable(
            "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "0", "a broken group cannot end in order, a finished one need not"
        ),
        Variable("RAY_DEDUP_LOGS", "0", "each rank's lines stay whole"),
        Variable("OMP_NUM_THREADS", threads, "torch's threads on each worker; Ray would set 1"),
        Variable("MKL_NUM_THREADS", threads, "as OMP_NUM_THREADS"),
        Variable("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3", "the flight recorder can dump; Ray's 1 prevents it"),
        Variable("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "a hung collective leaves evidence"),
        Variable(
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
            f"{tempfile.gettempdir()}/diffussm-nccl-{cfg.name}-",
            "where that evidence is looked for",
        ),
        Variable(
            "TORCH_NCCL_DEBUG_INFO_PIPE_FILE",
            f"{tempfile.gettempdir()}/diffussm-nccl-{cfg.name}-",
            "how that evidence is asked for before a collective gives up",
        ),
        Variable("TORCH_FR_BUFFER_SIZE", "2000", "collectives the flight recorder remembers"),
        Variable("TOKENIZERS_PARALLELISM", "false", "no thread pool in forked data loader workers"),
        Variable("DS_ACCELERATOR", "cuda" if cfg.cluster.gpus_per_worker else "cpu", "DeepSpeed need not probe"),
    ]


def apply(cfg: Config) -> dict[str, str]:
    """Set the variables in this process and return them for the workers.

    When we start Ray ourselves it gets a fresh token: any `ray.init` on this machine may have left one that other
    clusters then demand. The token stays out of the returned dict and of every log.
    """
    values = {variable.name: variable.value for variable in variables(cfg)}
    os.environ.update(values)
    if not cfg.cluster.address:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    return values
