"""Ray Train for our worker: its configs, our policies in its controller, and the overseer beside it."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from cluster import hub, worker
from cluster.causes import errors_of
from cluster.checkup import Preflight
from cluster.controller import OurFailurePolicy, OurScalingPolicy, sizes_of
from cluster.env import RANK_PROCESS
from cluster.hub import Place
from cluster.overseer import Overseer
from cluster.postmortem import PostMortem
from cluster.preempt import Warnings
from diffussm.checkpoint.store import open_store
from diffussm.config.schema import Config
from diffussm.errors import DiffuSSMError, ExitCode, InfrastructureError, MissingError, Preempted, StorageError
from diffussm.naming import RunPaths
from diffussm.train.control import Level

_LOG = logging.getLogger(__name__)

Announce = Callable[[dict[str, Any]], None]

CLOSE_S = 60.0
"""Longest wait at the end for evidence that is still being written."""


class Trainer(TorchTrainer):
    """TorchTrainer whose controller decides by our policies.

    Ray offers no public way to hand them in, so the keywords that its controller takes are replaced; Ray is pinned
    and a test kills a worker to see that our policy is asked.
    """

    def __init__(self, cfg: Config, channel: Any, scratch: str) -> None:
        cluster = cfg.cluster
        gpus = cluster.gpus_per_worker
        scaling = ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
        )
        self._failure_policy = OurFailurePolicy(cfg, channel)
        self._scaling_policy = OurScalingPolicy(cfg, scaling, channel)
        super().__init__(
            worker.run,
            train_loop_config={"cfg": cfg, "hub": channel},
            scaling_config=scaling,
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=round(cluster.start_s)),
            run_config=RunConfig(
                name=cfg.name,
                storage_path=scratch,  # Ray's own notes; our state goes to the run's store
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1),  # budgets are ours
                worker_runtime_env={"env_vars": {RANK_PROCESS.name: RANK_PROCESS.value}},
            ),
        )

    def _initialize_and_run_controller(self, **controller_init_kwargs: Any) -> Any:
        controller_init_kwargs |= {"failure_policy": self._failure_policy, "scaling_policy": self._scaling_policy}
        return super()._initialize_and_run_controller(**controller_init_kwargs)


class Faults:
    """Keeps the last failure, and what leads to its evidence.

    A store that hangs may be the failure itself, so a thread of its own writes: the overseer stays awake for warnings.
    """

    def __init__(self, cfg: Config, announce: Announce) -> None:
        self._announce = announce
        self._store = open_store(RunPaths(cfg.storage, cfg.name).root)
        self._postmortem = PostMortem(self._store)
        self.overseer: Overseer | None = None
        self.last: dict[str, Any] = {}
        self._todo: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._write, name="evidence", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Wait so long for what is still being written."""
        self._todo.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            _LOG.error("%s does not answer: evidence of the last failures is not stored", self._store.url)

    def _write(self) -> None:
        while (do := self._todo.get()) is not None:
            try:
                do()
            except (Exception, SystemExit):  # noqa: BLE001 - whoever is told may fail; the next piece is written all the same
                _LOG.exception("evidence is not told of")

    def places(self, attempt: int, places: Mapping[int, Place]) -> None:
        """Every rank of a start is there: note where, for people and for tools. Returns at once."""
        body = {
            rank: {"node": each.node, "host": each.host, "pid": each.pid, "started": each.started}
            for rank, each in sorted(places.items())
        }
        self._todo.put(partial(self._store_places, attempt, body))

    def fault(self, record: dict[str, Any]) -> None:
        """A failure: write its evidence. Returns at once."""
        self.last = record
        self._todo.put(partial(self._store_evidence, record, self.overseer.take_evidence() if self.overseer else {}))

    def _store_places(self, attempt: int, body: Mapping[int, Mapping[str, Any]]) -> None:
        try:
            self._store.write(f"attempts/{attempt}/ranks.json", json.dumps(body, indent=1).encode())
        except StorageError as error:
            self._announce({"kind": "event", "event": "places not stored", "reason": error.message})

    def _store_evidence(self, record: dict[str, Any], ranks: Mapping[int, Mapping[str, Any]]) -> None:
        folder = self._postmortem.write(record["attempt"], record, ranks)
        self._announce({"kind": "event", "event": "evidence", "folder": folder})


def fit(cfg: Config, scratch: str, announce: Announce, warnings: Warnings | None = None) -> None:
    """Train `cfg` on its workers; returns when the last image is seen and saved.

    Args:
        cfg: a checked config with absolute local paths.
        scratch: local folder for Ray's own notes.
        announce: called in a thread of this process with what the ranks and the policies say.
        warnings: signals to this process; while the training runs they are passed on to the ranks.

    Raises:
        DiffuSSMError: a worker's typed error, as it was raised there.
        Preempted: the job was asked to leave, and the next start goes on from its last checkpoint. When it was asked
            too late for that, fit returns and `warnings.wish` says so.
        MissingError: the preflight found too few good nodes.
        InfrastructureError: faults were more than their budget allows.
    """
    warnings = warnings or Warnings(cfg.cluster.grace_s)
    channel = hub.make()
    faults = Faults(cfg, announce)
    preflight = Preflight(cfg, channel)
    overseer = faults.overseer = Overseer(
        cfg, channel, warnings, announce, faults.fault, faults.places, preflight.look_at_new
    )
    overseer.start()
    warnings.heard_by_training = True
    try:
        if cfg.cluster.address or cfg.cluster.gpus_per_worker:  # one machine without GPUs was looked at by the driver
            preflight.run(announce, sizes_of(cfg).least, warnings.check)
        Trainer(cfg, channel, scratch).fit()
        asked = ray.get(channel.asked.remote())
        if asked.level is Level.LEAVE:  # after the last step in which the ranks could have heard it
            warnings.wish = warnings.wish.joined(asked)
    except TrainingFailedError as error:
        overseer.stop()
        raise _as_ours(error, cfg, faults.last) from error
    except ray.exceptions.RayError as error:  # the controller or the hub is gone: nobody is left to ask a policy
        overseer.stop()
        if isinstance(error, ray.exceptions.RayTaskError) and not isinstance(error.cause, ray.exceptions.RayError):
            raise  # a bug in our policies: a new start would only meet it again
        raise InfrastructureError(
            f"Ray's head or the controller of the training was lost ({type(error).__name__}: {error})",
            "start the same command again: the run goes on from its last checkpoint",
        ) from error
    finally:
        warnings.heard_by_training = False
        overseer.stop()
        faults.close(max(1.0, min(CLOSE_S, warnings.wish.deadline_s - time.time())))
        ray.kill(channel)


def _as_ours(error: TrainingFailedError, cfg: Config, last: dict[str, Any]) -> Exception:
    """The error to show: a worker's typed one, else its unexpected one, else the loss of workers."""
    code, reason = last.get("code", int(ExitCode.INFRASTRUCTURE)), last.get("reason", str(error))
    if code == ExitCode.PREEMPTED:  # whatever the ranks died of meanwhile: their errors are no reason not to come back
        return Preempted(reason, "start the same command again: it goes on from its last checkpoint")
    guilty = last.get("rank")
    causes = [cause for _, cause in sorted(errors_of(error).items(), key=lambda each: (each[0] != guilty, each[0]))]
    causes.append(getattr(error, "controller_failure", error))
    for cause in causes:  # that of the rank in question first; who only left as asked is no reason to end with its code
        if isinstance(cause, DiffuSSMError) and not (last and isinstance(cause, Preempted)):
            return cause
    if code == ExitCode.ENVIRONMENT:
        return MissingError(
            f"out of memory: {reason}", "set a smaller train.micro_batch, or train.activation_checkpointing=true"
        )
    if code == ExitCode.INTERNAL:
        return RuntimeError(f"{reason}\n{error}")  # a bug: shown with the traceback of the worker or the controller
    return InfrastructureError(
        f"faults beyond the budget (cluster.max_failures={cfg.cluster.max_failures}): {reason}",
        "start the same command again: the run goes on from its last checkpoint",
    )
