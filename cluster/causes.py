"""Why a worker group ended: one cause, one rank and one sentence from what Ray, the workers and the watchdog saw. Pure.

When one rank dies the others fail too, with errors of the collective they were in. Those are echoes: the cause is the
error that explains the most, and the order of `Cause` says which that is.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import ray.exceptions
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from diffussm.errors import DiffuSSMError, DivergedError, InfrastructureError, Preempted, Regroup, StorageError


class Cause(enum.Enum):
    """Kinds of ends, the most telling first: of several errors in one group the earliest listed is the cause."""

    USER = "user's error"
    """A typed error that only a person can mend: config, data, missing software."""
    NONFINITE = "non-finite"
    HANG = "hang"
    MEMORY = "out of memory"
    NODE = "node lost"
    WORKER = "worker died"
    STORAGE = "storage"
    PREEMPTED = "preemption"
    """The ranks saved and left, because the job or one of its nodes was asked to."""
    REGROUP = "regroup"
    """The ranks saved and left, so that nodes that came back can take part."""
    EXCEPTION = "exception"
    """An untyped exception: a bug, or a device that fails now and then."""
    NO_NODES = "no nodes"
    """Nodes were waited for in vain."""
    START = "start"
    """The group never began to train."""
    PEER = "connection lost"
    """Every rank lives and each lost another: the network."""


@dataclass(frozen=True)
class Evidence:
    """What others than the failed workers know."""

    lost_nodes: frozenset[str] = frozenset()
    """Ids of nodes that Ray has given up or that cannot be reached."""
    node_of_rank: Mapping[int, str] = field(default_factory=dict)
    """Node id by rank of the group that ended."""
    hang: str = ""
    """The watchdog's sentence, if it ended the group."""
    hung_rank: int | None = None


@dataclass(frozen=True)
class Diagnosis:
    """The cause in one sentence."""

    cause: Cause
    rank: int | None
    said: str


ECHO = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|unhandled system", re.I)
"""What collectives say when another rank is gone."""

_KILLED_FOR_MEMORY = re.compile(r"running low on memory|memory usage threshold", re.I)
"""Ray's memory monitor. Its text on any other death advises to look for the kernel's OOM killer, which says nothing."""
_NO_MEMORY = re.compile(r"can't allocate memory|cannot allocate memory|out of memory|can't start new thread", re.I)
"""A thread needs room for its stack, and is often what comes first when there is none."""
"""torch's allocators raise plain RuntimeErrors on the CPU."""
_NODE_DIED = re.compile(r"node (has )?(died|was terminated|is dead)|node .{0,80}\bdead\b", re.I)


def diagnose(error: TrainingFailedError, evidence: Evidence) -> Diagnosis:
    """The cause of a failed group."""
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, DiffuSSMError):
        return _of_controller(error.controller_failure)  # said by our policies after the group's end, hang or not
    if evidence.hang:
        return Diagnosis(Cause.HANG, evidence.hung_rank, evidence.hang)
    if isinstance(error, PreemptionError):
        return Diagnosis(Cause.PREEMPTED, None, "a node is drained")
    if isinstance(error, ControllerError):
        return _of_controller(error.controller_failure)
    errors = errors_of(error)
    found = [_of_rank(rank, each, evidence) for rank, each in sorted(errors.items())]
    if not found:
        return Diagnosis(Cause.WORKER, None, f"the group ended without a word: {_first_line(error)}")
    order = list(Cause)
    best = min(found, key=lambda diagnosis: (order.index(diagnosis.cause), diagnosis.rank))
    gone = sorted(rank for rank, node in evidence.node_of_rank.items() if node in evidence.lost_nodes)
    if best.cause is Cause.PEER and gone:  # the rank on the lost node has not been missed yet
        return _node_lost(gone[0], evidence)
    return best


def errors_of(error: BaseException) -> dict[int, BaseException]:
    """The workers' own exceptions by rank; empty if the failure was not theirs."""
    return dict(error.worker_failures) if isinstance(error, WorkerGroupError) else {}


def _of_rank(rank: int, error: BaseException, evidence: Evidence) -> Diagnosis:
    """The cause as one rank's error tells it."""
    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    if isinstance(error, DiffuSSMError):
        return Diagnosis(_typed(error), rank, f"rank {rank}: {error.message}")
    said = f"rank {rank}: {type(error).__name__}: {_first_line(error)}"
    if isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)):
        return Diagnosis(Cause.MEMORY, rank, said)
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return Diagnosis(Cause.HANG, rank, said)
    if isinstance(error, ray.exceptions.OutOfMemoryError | MemoryError) or _is_torch(error, "OutOfMemoryError"):
        return Diagnosis(Cause.MEMORY, rank, said)
    if isinstance(error, ray.exceptions.RayActorError | ray.exceptions.WorkerCrashedError):
        return _of_dead_actor(rank, error, evidence)
    if isinstance(error, ray.exceptions.NodeDiedError):
        return Diagnosis(Cause.NODE, rank, said)
    if isinstance(error, ray.exceptions.RayError):
        return Diagnosis(Cause.WORKER, rank, said)
    if _is_echo(error):
        return Diagnosis(Cause.PEER, rank, said)
    return Diagnosis(Cause.EXCEPTION, rank, said)


def _of_dead_actor(rank: int, error: BaseException, evidence: Evidence) -> Diagnosis:
    """A worker process is gone: alone, with its node, or shot for its memory."""
    node = evidence.node_of_rank.get(rank, "")
    if _KILLED_FOR_MEMORY.search(str(error)):
        return Diagnosis(Cause.MEMORY, rank, f"rank {rank}: killed because its node ran out of memory")
    if node in evidence.lost_nodes or _NODE_DIED.search(str(error)):
        return _node_lost(rank, evidence)
    return Diagnosis(Cause.WORKER, rank, f"rank {rank}: its process died{_how(error)}")


def _node_lost(rank: int, evidence: Evidence) -> Diagnosis:
    node = evidence.node_of_rank.get(rank, "")
    return Diagnosis(Cause.NODE, rank, f"rank {rank}: its node {node[:8]} is lost".replace("  ", " "))


def _how(error: BaseException) -> str:
    """What Ray knows of a process's end, as ` (...)`."""
    found = re.search(r"exit (?:code|detail|type)[^.\n]*", str(error), re.I)
    return f" ({found.group().strip()})" if found else ""


def _of_controller(error: BaseException) -> Diagnosis:
    if isinstance(error, DiffuSSMError):
        return Diagnosis(_typed(error), None, error.message)
    if isinstance(error, WorkerGroupStartupFailedError | WorkerGroupStartupTimeoutError | ray.exceptions.RayError):
        return Diagnosis(Cause.START, None, f"the workers did not start: {_first_line(error)}")
    if _is_echo(error):
        return Diagnosis(Cause.START, None, f"the process group was not made: {_first_line(error)}")
    return Diagnosis(Cause.EXCEPTION, None, f"controller: {type(error).__name__}: {_first_line(error)}")


def _typed(error: DiffuSSMError) -> Cause:
    """Cause of one of our own errors."""
    if isinstance(error, Regroup):
        return Cause.REGROUP
    if isinstance(error, Preempted):
        return Cause.PREEMPTED
    if isinstance(error, StorageError):
        return Cause.STORAGE
    if isinstance(error, InfrastructureError):
        return Cause.NO_NODES
    return Cause.NONFINITE if isinstance(error, DivergedError) else Cause.USER


def _is_echo(error: BaseException) -> bool:
    """Whether a collective lost its peer rather than the code its way."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if any(_is_torch(error, name) for name in ("DistBackendError", "DistNetworkError", "DistStoreError")):
        return True
    return isinstance(error, RuntimeError) and type(error) is RuntimeError and bool(ECHO.search(str(error)))


def _is_torch(error: BaseException, name: str) -> bool:
    """Whether it is torch's exception of this name; torch need not be imported to ask."""
    return any(each.__name__ == name and each.__module__.startswith("torch") for each in type(error).__mro__)


def _first_line(error: BaseException) -> str:
    """The first line that says something, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "no message")[:300]
