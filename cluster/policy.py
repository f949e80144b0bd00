"""What to do after a failure: pure decisions, and the bridge that lets Ray Train's controller ask for them."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from diffussm.errors import DiffuSSMError, ExitCode


class Action(enum.Enum):
    """What happens to the worker group."""

    RESTART = "restart"
    STOP = "stop"


@dataclass(frozen=True)
class Decision:
    """An action and, for people, why."""

    action: Action
    reason: str


@dataclass(frozen=True)
class Failure:
    """What the controller saw: errors by rank (none if no worker reported one) and how many failures came before."""

    errors: Mapping[int, BaseException]
    earlier: int


RETRIED = frozenset({ExitCode.INFRASTRUCTURE, ExitCode.STORAGE})
"""Kinds of typed errors that may pass by themselves; all others would only repeat."""


def may_pass(error: BaseException) -> bool:
    """Whether a worker's error may be gone after a restart.

    A lost peer shows up as RuntimeError (gloo, NCCL), OSError or one of Ray's own; anything else is a bug that would
    be met again, and so would too little memory or a missing file.
    """
    if isinstance(error, DiffuSSMError):
        return error.code in RETRIED
    if isinstance(error, NotImplementedError | RecursionError | FileNotFoundError | PermissionError):
        return False
    if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
        return False
    return isinstance(error, RuntimeError | OSError) or type(error).__module__.split(".")[0] == "ray"


def decide(failure: Failure, max_failures: int) -> Decision:
    """Restart after a lost worker or a passing fault, within the budget; stop at a user's error at once."""
    for rank, error in sorted(failure.errors.items()):
        if not may_pass(error):
            said = error.message if isinstance(error, DiffuSSMError) else f"{type(error).__name__}: {error}"
            return Decision(Action.STOP, f"rank {rank}: {said}")
    if failure.earlier >= max_failures:
        return Decision(Action.STOP, f"{failure.earlier + 1} failures, cluster.max_failures={max_failures}")
    named = "; ".join(f"rank {rank}: {type(error).__name__}" for rank, error in sorted(failure.errors.items()))
    return Decision(Action.RESTART, f"failure {failure.earlier + 1} of at most {max_failures} ({named or 'no worker'})")
