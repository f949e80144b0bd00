"""Typed errors: what went wrong, where, what is allowed, what to do, and the exit code a scheduler acts on.

Every error a user can cause or must act on is a `DiffuSSMError`. The message names the key or object, what was
found and what is allowed; `remedy` says what to do. The exit code tells a scheduler whether to start the run again.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit code of every command. Only PREEMPTED and INFRASTRUCTURE ask for the same command to be started again."""

    DONE = 0
    """The command finished, or there was nothing left to do."""
    INTERNAL = 1
    """An unexpected exception: a bug. The traceback is in the log."""
    USAGE = 2
    """The command line is wrong."""
    CONFIG = 64
    """A config key, value or combination is refused."""
    DATA = 65
    """Input data is missing, corrupt, or was made with other settings."""
    STORAGE = 66
    """A folder or bucket cannot be read or written."""
    DIVERGED = 67
    """Too many non-finite steps in a row."""
    ENVIRONMENT = 69
    """Software or hardware is missing on this machine."""
    PREEMPTED = 75
    """The run was asked to leave, saved its state, and goes on when started again."""
    INFRASTRUCTURE = 76
    """A worker or node was lost more often than the budget allows; starting again may help."""
    SUPERSEDED = 77
    """A newer start of the same run took over; this one must not be started again."""


class DiffuSSMError(Exception):
    """Base of all errors that are reported to the user without a traceback.

    Args:
        message: which key or object, what was found, what is allowed.
        remedy: what the user can do about it; printed on a line of its own.
    """

    code: ExitCode = ExitCode.INTERNAL

    def __init__(self, message: str, remedy: str = "") -> None:
        # Both go to Exception's args, so that the error survives pickling between processes.
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.remedy}" if self.remedy else self.message


class UsageError(DiffuSSMError):
    """The command line is wrong."""

    code = ExitCode.USAGE


class ConfigError(DiffuSSMError):
    """A config key, value or combination is refused."""

    code = ExitCode.CONFIG


class DataError(DiffuSSMError):
    """Input data is missing, corrupt, or was made with other settings than the config asks for."""

    code = ExitCode.DATA


class RestoreMismatch(DataError):
    """What was restored, or the first step from there, is not what the run had before."""


class StorageError(DiffuSSMError):
    """A folder or bucket cannot be read or written."""

    code = ExitCode.STORAGE


class DivergedError(DiffuSSMError):
    """Loss or gradients stayed non-finite for longer than `train.max_nonfinite_steps`."""

    code = ExitCode.DIVERGED


class MissingError(DiffuSSMError):
    """Software or hardware that the command needs is missing on this machine."""

    code = ExitCode.ENVIRONMENT


class Preempted(DiffuSSMError):
    """The run was asked to leave; its state is saved."""

    code = ExitCode.PREEMPTED


class Regroup(Preempted):
    """The ranks saved their state and left so that the group can be made anew with another size."""


class Superseded(DiffuSSMError):
    """A newer start of the same run has taken over; this one may write nothing more."""

    code = ExitCode.SUPERSEDED


class InfrastructureError(DiffuSSMError):
    """Workers or nodes were lost more often than the budget allows."""

    code = ExitCode.INFRASTRUCTURE


def exit_code_table() -> str:
    """The exit codes as a Markdown table, for the README (a test keeps the two equal)."""
    rows = ["| code | name | meaning |", "|---|---|---|"]
    docs = {
        ExitCode.DONE: "finished, or nothing left to do",
        ExitCode.INTERNAL: "an unexpected exception: a bug; the traceback is in the log",
        ExitCode.USAGE: "the command line is wrong",
        ExitCode.CONFIG: "a config key, value or combination is refused",
        ExitCode.DATA: "input data is missing, corrupt, or was made with other settings",
        ExitCode.STORAGE: "a folder or bucket cannot be read or written",
        ExitCode.DIVERGED: "too many non-finite steps in a row",
        ExitCode.ENVIRONMENT: "software or hardware is missing on this machine",
        ExitCode.PREEMPTED: "saved and asked to leave: start the same command again",
        ExitCode.INFRASTRUCTURE: "workers or nodes lost beyond the budget: start the same command again",
        ExitCode.SUPERSEDED: "a newer start of the same run took over: do not start this one again",
    }
    rows += [f"| {code.value} | `{code.name.lower()}` | {docs[code]} |" for code in ExitCode]
    return "\n".join(rows)
