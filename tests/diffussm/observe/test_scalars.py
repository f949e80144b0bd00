from __future__ import annotations

from cluster.policy import FREE
from diffussm.observe.scalars import ORDERLY, Urgency, alert, saved_checkpoint, scalars


def test_numbers_of_a_record_are_named_flat_and_others_left_out() -> None:
    progress = {
        "kind": "progress", "images": 8, "total": 80, "attempt": 1, "loss": None, "lr": 1e-4, "samples": "ff",
        "seconds": {"step": 2.0, "data": 0.5},
    }  # fmt: skip
    assert scalars(progress) == {"lr": 1e-4, "seconds/step": 2.0, "seconds/data": 0.5}
    telemetry = {
        "kind": "telemetry", "images": 8, "grad_norm": {"head": 1.0, "stem": None}, "ema_distance": {"ema-plain": 0.1},
        "nodes": {"a": {"cpu_percent": 3.0}}, "goodput": 0.9,
    }  # fmt: skip
    assert scalars(telemetry) == {
        "grad_norm_of/head": 1.0, "ema_distance/ema-plain": 0.1, "nodes/a/cpu_percent": 3.0, "goodput": 0.9,
    }  # fmt: skip
    assert scalars({"kind": "evaluation", "images": 8, "line": "x", "score/FD": 3.0}) == {"score/FD": 3.0}
    assert scalars({"kind": "event", "event": "saved", "images": 8}) == {}


def test_faults_and_preemptions_are_alerts() -> None:
    assert alert({"kind": "event", "event": "hang", "reason": "rank 3"}) == ("hang", "reason rank 3", Urgency.ERROR)
    leaving = alert({"kind": "event", "event": "asked to leave", "reason": "SIGTERM"})
    assert leaving == ("asked to leave", "reason SIGTERM", Urgency.WARNING)
    assert alert({"kind": "event", "event": "saved"}) is None
    assert alert({"kind": "progress", "loss": 1.0}) is None


def test_a_group_that_left_because_it_was_asked_to_has_not_failed() -> None:
    assert {cause.value for cause in FREE} == ORDERLY
    failure = {"kind": "event", "event": "failure", "decision": "stop", "reason": "SIGUSR1 to the driver"}
    assert alert(failure | {"cause": "preemption"}) is None
    assert alert(failure | {"cause": "regroup"}) is None
    found = alert(failure | {"cause": "worker died"})
    assert found is not None
    assert found[2] is Urgency.ERROR


def test_only_checkpoints_in_storage_are_pointed_to() -> None:
    saved = {"kind": "event", "event": "saved", "tier": "storage", "checkpoint": "checkpoints/000000000008"}
    assert saved_checkpoint(saved) == "checkpoints/000000000008"
    assert saved_checkpoint(saved | {"tier": "local"}) is None
    assert saved_checkpoint({"kind": "event", "event": "trained"}) is None
