"""How long a pod that must go has: the save decides, Ray's drain lasts longer, the pod's grace longest. Pure."""

from __future__ import annotations

from dataclasses import dataclass

UNMEASURED_SAVE_S = 60.0
"""Assumed, or what the plan says if that is longer, before a run has saved for the first time; the next submission
uses what was measured."""
AGREEMENT_S = 15.0
"""For the warning to reach every rank and for the step in which it does."""
LEAVING_S = 30.0
"""For processes to end after the drain."""


@dataclass(frozen=True)
class Grace:
    """Seconds, each above the one before it."""

    save_s: float
    """The save, measured, planned or assumed."""
    drain_s: int
    """Ray's drain: within it the node is not killed and its ranks save."""
    pod_s: int
    """terminationGracePeriodSeconds."""


def grace(measured_save_s: float | None, planned_save_s: float | None = None) -> Grace:
    """Twice the save, and time to agree, drain; and time to leave, the pod's grace."""
    save_s = max(UNMEASURED_SAVE_S, planned_save_s or 0.0) if measured_save_s is None else measured_save_s
    drain_s = round(2 * save_s + AGREEMENT_S)
    return Grace(save_s, drain_s, round(drain_s + LEAVING_S))
