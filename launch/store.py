"""Questions to the store, put to a process of its own: what reads a bucket is too heavy for this side."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from diffussm.errors import StorageError
from launch import local

PATIENCE_S = 30
"""Seconds for an answer; a store that is away would otherwise be tried for minutes."""


def ask(verb: str, *places: str) -> Any:
    """What `python -m diffussm.observe.runs` answers.

    Raises:
        StorageError: the store cannot be reached, or not in time; says why.
    """
    command = [*local.module("diffussm.observe.runs"), verb, *places]
    try:
        done = subprocess.run(  # noqa: S603 - a list, no shell
            command, capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
    except subprocess.TimeoutExpired as error:
        raise StorageError(
            f"{' and '.join(places)}: no answer within {PATIENCE_S} s",
            "look at the address, the credentials, the network",
        ) from error
    if done.returncode:
        message, _, remedy = done.stderr.strip().rpartition("\n  -> ")
        said = (message or remedy).strip().splitlines()
        raise StorageError(said[-1] if said else f"{verb} failed", remedy if message else "")
    return json.loads(done.stdout)
