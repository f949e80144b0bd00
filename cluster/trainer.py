"""Ray Train for our worker: scaling, failure policy, and the road of its messages to the driver."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.queue import Empty, Queue

from cluster import worker
from cluster.policy import Action, Failure, decide, may_pass
from diffussm.config.schema import Config
from diffussm.errors import DiffuSSMError, InfrastructureError

Announce = Callable[[dict[str, Any]], None]


class OurPolicy(FailurePolicy):
    """Lets Ray's controller ask `policy.decide`. It runs in the controller's process."""

    def __init__(self, failure_config: FailureConfig, limit: int, channel: Queue) -> None:
        super().__init__(failure_config)
        self.limit, self.channel, self.earlier = limit, channel, 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Count the failure and decide."""
        decision = decide(Failure(errors_of(training_failed_error), self.earlier), self.limit)
        self.earlier += 1
        said = {"kind": "event", "event": "failure", "decision": decision.action.value, "reason": decision.reason}
        self.channel.put(said)
        return FailureDecision.RETRY if decision.action is Action.RESTART else FailureDecision.RAISE


def errors_of(error: TrainingFailedError) -> dict[int, BaseException]:
    """The workers' own exceptions by rank; empty if the failure was not theirs."""
    return dict(error.worker_failures) if isinstance(error, WorkerGroupError) else {}


class Trainer(TorchTrainer):
    """TorchTrainer whose controller decides by our policy.

    Ray offers no public way to hand in a failure policy, so the keyword that its controller takes is replaced; Ray is
    pinned and a test kills a worker to see that our policy is asked.
    """

    def __init__(self, cfg: Config, channel: Queue, scratch: str) -> None:
        cluster = cfg.cluster
        gpus = cluster.gpus_per_worker
        self._policy = OurPolicy(
            FailureConfig(max_failures=cluster.max_failures, controller_failure_limit=3), cluster.max_failures, channel
        )
        super().__init__(
            worker.run,
            train_loop_config={"cfg": cfg, "channel": channel},
            scaling_config=ScalingConfig(
                num_workers=cluster.workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
            ),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            run_config=RunConfig(
                name=cfg.name,
                storage_path=scratch,  # Ray's own notes; our state goes to the run's store
                failure_config=self._policy.failure_config,
            ),
        )

    def _initialize_and_run_controller(self, **controller_init_kwargs: Any) -> Any:
        controller_init_kwargs["failure_policy"] = self._policy
        return super()._initialize_and_run_controller(**controller_init_kwargs)


def fit(cfg: Config, scratch: str, announce: Announce) -> None:
    """Train `cfg` on its workers; returns when the last image is seen and saved.

    Args:
        cfg: a checked config with absolute local paths.
        scratch: local folder for Ray's own notes.
        announce: called in a thread of this process with what rank 0 and the policy say.

    Raises:
        DiffuSSMError: a worker's typed error, as it was raised there.
        InfrastructureError: workers were lost more often than `cluster.max_failures`.
    """
    channel = Queue(actor_options={"num_cpus": 0})
    stop = threading.Event()
    listener = threading.Thread(target=_listen, args=(channel, stop, announce), name="announcements", daemon=True)
    listener.start()
    try:
        Trainer(cfg, channel, scratch).fit()
    except TrainingFailedError as error:
        raise _as_ours(error, cfg) from error
    finally:
        stop.set()
        listener.join()
        channel.shutdown()


def _listen(channel: Queue, stop: threading.Event, announce: Announce) -> None:
    """Pass on what comes until told to stop, and then what is left."""
    while True:
        last = stop.is_set()
        try:
            announce(channel.get_nowait() if last else channel.get(timeout=0.5))
        except Empty:
            if last:
                return
        except ray.exceptions.RayActorError as error:
            logging.getLogger(__name__).warning("messages of the workers are lost: %s", error)
            return


def _as_ours(error: TrainingFailedError, cfg: Config) -> Exception:
    """The error to show: a worker's typed one, else its unexpected one, else the loss of workers."""
    errors = errors_of(error)
    for _, cause in sorted(errors.items()):
        if isinstance(cause, DiffuSSMError):
            return cause
    if any(not may_pass(cause) for cause in errors.values()):
        return RuntimeError(str(error))  # a bug: shown with the worker's traceback
    return InfrastructureError(
        f"the workers were lost more than cluster.max_failures={cfg.cluster.max_failures} times: {error}",
        "start the same command again: the run goes on from its last checkpoint",
    )
