"""What the records of a run mean to a service of curves: numbers by name, and what is worth an alert. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

_NO_CURVES = {"kind", "images", "total", "attempt", "samples", "rank"}


class Urgency(Enum):
    """How loud an alert is."""

    WARNING = "warning"
    ERROR = "error"


ALERTS = {
    "non-finite step": Urgency.WARNING,
    "save failed": Urgency.WARNING,
    "averages save failed": Urgency.WARNING,
    "straggler": Urgency.WARNING,
    "bad node": Urgency.WARNING,
    "asked to leave": Urgency.WARNING,
    "hang": Urgency.ERROR,
    "failure": Urgency.ERROR,
    "stopped": Urgency.ERROR,
}
"""Events that somebody should hear of at once: `asked to leave` is a preemption."""


ORDERLY = frozenset({"preemption", "regroup"})
"""Causes of a `failure` of the group that is none: it saved and left because it was asked to."""


def is_failure(record: Mapping[str, Any]) -> bool:
    """Whether an event says that the group of workers failed. Pure."""
    return record.get("event") == "failure" and record.get("cause") not in ORDERLY


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a `progress`, `telemetry` or `evaluation` record, nested ones joined by a slash.

    Empty for other records. `grad_norm` by block stays apart from the whole one: it becomes `grad_norm_of/blocks.3`.
    """
    if record.get("kind") not in ("progress", "telemetry", "evaluation"):
        return {}
    found: dict[str, float] = {}
    for name, value in record.items():
        if name in _NO_CURVES:
            continue
        if isinstance(value, Mapping):
            found |= _flat(f"{name}_of" if name.endswith("_norm") else name, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    return found


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(f"{prefix}/{name}", value)
        elif isinstance(value, int | float):
            found[f"{prefix}/{name}"] = value
    return found


def alert(record: Mapping[str, Any]) -> tuple[str, str, Urgency] | None:
    """Title, text and urgency of an event that is worth an alert; None for all others."""
    event = record.get("event")
    if record.get("kind") != "event" or event not in ALERTS:
        return None
    if event == "failure" and not is_failure(record):
        return None
    details = {k: v for k, v in record.items() if k not in ("kind", "event")}
    return str(event), ", ".join(f"{name} {value}" for name, value in details.items()), ALERTS[event]


def saved_checkpoint(record: Mapping[str, Any]) -> str | None:
    """Folder, within the run, of a checkpoint that is now in storage; None for all other records."""
    if record.get("event") == "saved" and record.get("tier") == "storage":
        return str(record["checkpoint"])
    return None
