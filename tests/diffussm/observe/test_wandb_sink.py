"""Real W&B: offline, read back from its files, and online with a server that never answers."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffussm.checkpoint.store import open_store
from diffussm.config.schema import WandbMode
from diffussm.naming import wandb_id
from diffussm.observe.mirror import Mirror
from diffussm.observe.wandb_sink import Wandb, step_after, wandb_mode
from tests.wandb_files import history, records


@pytest.mark.parametrize(
    ("asked", "environment", "expected"),
    [
        (WandbMode.auto, {}, "offline"),
        (WandbMode.auto, {"WANDB_API_KEY": "k"}, "online"),
        (WandbMode.auto, {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        (WandbMode.auto, {"WANDB_MODE": "disabled"}, "disabled"),
        (WandbMode.auto, {"WANDB_MODE": "online"}, "online"),
        (WandbMode.offline, {"WANDB_MODE": "online"}, "offline"),
        (WandbMode.disabled, {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_mode_follows_config_then_environment(
    asked: WandbMode, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(asked) == expected


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


STORY: list[dict[str, Any]] = [
    {"kind": "progress", "images": 8, "total": 80, "loss": 1.5, "loss_q1": 2.0, "attempt": 1, "samples": "ff"},
    {"kind": "telemetry", "images": 8, "grad_norm": {"head": 0.5}, "nodes": {"host": {"cpu_percent": 7.0}}},
    {"kind": "event", "event": "hang", "reason": "rank 3"},
    {"kind": "event", "event": "saved", "tier": "storage", "images": 8, "checkpoint": "checkpoints/000000000008"},
    {"kind": "evaluation", "images": 8, "score/FD": 42.0},
]
ABOUT = {
    "train": {"lr": 1e-4}, "code": {"torch": "2"}, "dataset": {"number": 40},
    "slurm": {"environment": ["TOKEN=canary-of-the-config"]},
}  # fmt: skip


def start(root: Path, story: list[dict[str, Any]], first_step: int) -> Path:
    """One start of a run that tells `story`; returns the file it left."""
    before = set(root.glob("wandb/offline-run-*/*.wandb"))
    service = Wandb(
        "my-run", "project", "s3://bucket/runs/my-run", "offline", ABOUT,
        Mirror(open_store(str(root)), "wandb", root / "scratch"), first_step,
    )  # fmt: skip
    for record in story:
        service.take(record)
    service.close()
    (file,) = set(root.glob("wandb/offline-run-*/*.wandb")) - before
    return file


def test_a_requeued_run_goes_on_with_the_same_curve_and_everything_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-the-environment")
    monkeypatch.setenv("WANDB_API_KEY", "c" * 40)
    picture = {"kind": "picture", "name": "samples", "images": 8, "png": png(), "caption": "credit"}
    first = start(tmp_path, [*STORY, picture], 0)
    second = start(tmp_path, [STORY[0] | {"images": 4}], step_after(6, 1))  # replayed: images go back, W&B's step not
    files = {"first": list(records(first)), "second": list(records(second))}
    runs = {name: next(r.run for r in found if r.WhichOneof("record_type") == "run") for name, found in files.items()}
    assert {run.run_id for run in runs.values()} == {wandb_id("my-run")}
    rows = [*history(first), *history(second)]
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    assert [row["images"] for row in rows] == [8, 8, 8, 8, 4]
    merged = {key: value for row in rows[:4] for key, value in row.items()}
    expected = {"loss": 1.5, "loss_q1": 2.0, "grad_norm_of/head": 0.5, "nodes/host/cpu_percent": 7.0, "score/FD": 42.0}
    assert expected.items() <= merged.items()
    assert merged["samples/_type"] == "image-file"
    config = {item.key: json.loads(item.value_json) for item in runs["first"].config.update}
    assert config["train"] == {"lr": 1e-4}
    assert config["dataset"] == {"number": 40}
    assert "slurm" not in config
    metrics = {r.metric.name or r.metric.glob_name: r.metric for r in files["first"] if r.HasField("metric")}
    assert metrics["*"].step_metric == "images"
    (alert,) = [r.alert for r in files["first"] if r.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.text, alert.level) == ("my-run: hang", "reason rank 3", "ERROR")
    (artifact,) = [r.artifact for r in files["first"] if r.WhichOneof("record_type") == "artifact"]
    (entry,) = artifact.manifest.contents
    assert entry.ref == "s3://bucket/runs/my-run/checkpoints/000000000008"
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (b"canary-of-the-config", b"canary-of-the-environment", b"c" * 40):
        assert secret not in everything


HANGING = """
import sys
import psutil
from functools import partial
from pathlib import Path
from diffussm.checkpoint.store import open_store
from diffussm.observe.mirror import Mirror
from diffussm.observe.sinks import Sink
from diffussm.observe.wandb_sink import Wandb, abandon
root = Path(sys.argv[1])
mirror = Mirror(open_store(str(root)), "wandb", root / "scratch")
sink = Sink("W&B", partial(Wandb, "my-run", "project", str(root), "online", {}, mirror, 0), print, abandon)
for images in range(100):
    sink.write({"kind": "progress", "images": images, "loss": 1.0})
print("steps done", flush=True)
sink.close(3)
cores = [child for child in psutil.Process().children() if "wandb-core" in child.name()]
print("closed; left to end:", len(psutil.wait_procs(cores, 30)[1]), flush=True)
"""


def test_a_server_that_never_answers_keeps_neither_steps_nor_the_process_waiting(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)  # connections are accepted by the kernel, and nobody reads them
        environment = os.environ | {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "WANDB_API_KEY": "c" * 40,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", HANGING, str(tmp_path)],
            env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "steps done",
        "W&B did not finish within 3 s and is left alone",
        "closed; left to end: 0",
    ]
