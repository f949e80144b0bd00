"""A run's store with everything a report can show, written as the run itself would write it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from diffussm.checkpoint.store import LocalStore, Store, open_store
from diffussm.config import dump
from diffussm.config.schema import Config, DataConfig, TrainConfig
from diffussm.observe.grid import grid

BEGAN = 1_790_000_000.0
STEPS = 60
STEP = 100
HOSTILE = "</script><script>window.broken = 1</script>"


def run(folder: Path) -> Store:
    """Two starts of a run, the first ended by a fault; replayed steps; three grids, two scores, a ledger."""
    store = open_store(str(folder / "a-run"))
    assert isinstance(store, LocalStore)
    cfg = Config(name="a-run", storage=str(folder), data=DataConfig(latents="l"), train=TrainConfig(images=8_000))
    cfg.train.lr = 0.25
    store.write("config.yaml", dump(cfg).encode())
    metrics, events, book = [], [], []
    for attempt, first, last, start in ((1, 1, 30, BEGAN), (2, 21, STEPS, BEGAN + 500)):
        begin = {"time": start, "attempt": attempt}
        events.append(begin | {"event": "resumed" if attempt > 1 else "started", "images": (first - 1) * STEP})
        book.append(begin | {"kind": "begin", "images": 0, "seconds": {"start": 8.0, "restore": 1.0 * (attempt - 1)}})
        for step in range(first, last + 1):
            images, at = step * STEP, start + 10 * (step - first + 1)
            loss = 0.2 + math.exp(-step / 10) + 0.01 * attempt
            line = {"images": images, "step": step, "epoch": 0, "loss": loss, "grad_norm": 1 / step, "lr": 1e-3}
            metrics.append({"time": at} | line | {"images_per_s": 10.0, "nonfinite_steps": 0, "attempt": attempt})
            replayed = attempt == 2 and step <= 30
            parts = {"data": 0.5, "save": 0.25, "replayed" if replayed else "step": 9.0}
            book.append({"time": at, "attempt": attempt, "kind": "steps", "images": images, "seconds": parts})
        if attempt == 1:
            failure = {"event": "failure", "decision": "restart", "reason": f"rank 1: killed {HOSTILE}"}
            events.append({"time": start + 301, "attempt": 1} | failure)
        saved = {"event": "saved", "images": last * STEP, "checkpoint": f"checkpoints/{last * STEP:012d}"}
        events.append({"time": start + 10 * (last - first + 1), "attempt": attempt} | saved)
        store.write(f"attempts/{attempt}/start.json", json.dumps({"host": "node-a", "pid": 7, "time": start}).encode())
    for name, lines in (("metrics", metrics), ("events", events), ("goodput", book)):
        store.write(f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    for images, grey in ((2_000, 60), (4_000, 130), (6_000, 200)):
        pictures = np.full((4, 8, 8, 3), grey, dtype=np.uint8)
        store.write(f"samples/{images:012d}.png", grid(pictures, ["cat", "dog"], scale=4))
    store.write(f"samples/{6_000:012d}-guidance.png", grid(pictures, ["1", "3"], scale=4))
    for images, value in ((2_000, 180.0), (6_000, 120.5)):
        score = {"value": value, "floor": 46.1, "interval": [value - 5, value + 6]}
        result = {
            "scores": {"FD-EffLite0": score, "precision": score | {"value": 0.5}}, "n": 260,
            "checkpoint": {"images": images, "weights": "ema-plain"},
            "settings": {"sample": {"ema": "plain", "guidance": 1.5, "sampler": "ddim", "steps": 50}},
        }  # fmt: skip
        store.write(f"evaluations/{images:012d}-efflite0-c0ffee00.json", json.dumps(result).encode())
    return store
