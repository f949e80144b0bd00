"""One sentence and one folder of evidence for each failure, below `attempts/<n>/postmortem/`."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from diffussm.checkpoint.store import Store
from diffussm.errors import StorageError

_LOG = logging.getLogger(__name__)

EVIDENCE = {"stacks": "stacks-rank{}.txt", "flight_recorder": "nccl-rank{}.bin"}
"""Kinds of evidence that become files of their own."""


class PostMortem:
    """Writes the folders. Its only writer is the driver."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, attempt: int, fault: Mapping[str, Any], ranks: Mapping[int, Mapping[str, Any]]) -> str:
        """Write the evidence of one failure; returns the folder.

        Args:
            attempt: number of the start that failed; 0 if none had a number yet.
            fault: what the failure policy said: cause, rank, reason, decision, images, errors.
            ranks: evidence by rank, as `stacks.collect` found it; empty unless the group hung.

        A store that is away is often the failure itself, so what cannot be written is logged and the job goes on.
        """
        folder = f"attempts/{attempt}/postmortem"
        try:
            folder = self._free(folder)
            for key, body in files(fault, ranks).items():
                self._store.write(f"{folder}/{key}", body)
        except StorageError as error:
            _LOG.warning("the post-mortem of attempt %d is not stored: %s", attempt, error.message)
        return folder

    def _free(self, folder: str) -> str:
        """`folder`, or the first of folder-2, folder-3 ... that is free: an earlier driver may have written there."""
        taken = {key.removeprefix(folder).split("/")[0] for key in self._store.keys(folder)}
        number = next(n for n in itertools.count(1) if ("" if n == 1 else f"-{n}") not in taken)
        return folder if number == 1 else f"{folder}-{number}"


def files(fault: Mapping[str, Any], ranks: Mapping[int, Mapping[str, Any]]) -> dict[str, bytes]:
    """The folder's files: summary.json with the sentence, an error for each rank, stacks and recorders. Pure."""
    kept = {key: value for key, value in fault.items() if key not in ("kind", "event", "errors")}
    state = {rank: {k: v for k, v in found.items() if k not in EVIDENCE} for rank, found in ranks.items()}
    summary = {"time": round(time.time(), 3), "sentence": sentence(fault), **kept, "ranks": state}
    made = {"summary.json": json.dumps(summary, indent=1).encode()}
    for rank, text in fault.get("errors", {}).items():
        made[f"error-rank{rank}.txt"] = str(text).encode()
    for rank, found in ranks.items():
        for kind, name in EVIDENCE.items():
            if found.get(kind):
                body = found[kind]
                made[name.format(rank)] = body if isinstance(body, bytes) else str(body).encode()
    return made


def sentence(fault: Mapping[str, Any]) -> str:
    """What happened and what follows, in one sentence."""
    return f"{fault['cause']} at {fault['images']:,} images: {fault['reason']}; decision: {fault['decision']}."
