"""Questions to the store, put to a process of its own: what reads a bucket is too heavy for this side."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from diffussm.errors import StorageError
from launch import local


def ask(verb: str, *places: str) -> Any:
    """What `python -m diffussm.observe.runs` answers.

    Raises:
        StorageError: the store cannot be reached; says why.
    """
    command = [*local.module("diffussm.observe.runs"), verb, *places]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a list, no shell
    if done.returncode:
        message, _, remedy = done.stderr.strip().rpartition("\n  -> ")
        said = (message or remedy).strip().splitlines()
        raise StorageError(said[-1] if said else f"{verb} failed", remedy if message else "")
    return json.loads(done.stdout)
