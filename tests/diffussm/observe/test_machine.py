from __future__ import annotations

import math

import torch

from diffussm.observe.machine import FIELDS, Machine, by_node

NAN = float("nan")


def test_this_machine_has_memory_and_a_process() -> None:
    found = dict(zip(FIELDS, Machine(torch.device("cpu")).read(), strict=True))
    assert 0 < found["memory_percent"] <= 100
    assert 0.01 < found["rss_gb"] < 100
    assert math.isnan(found["gpu_peak_gb"])


def test_ranks_of_a_node_are_put_together() -> None:
    readings = [
        [50.0, 10.0, 1.0, 2.0, 90.0, 70.0, 60.0, 300.0],
        [52.0, 10.0, 1.0, 3.0, 80.0, 75.0, 61.0, 400.0],
        [5.0, 20.0, NAN, 1.0, NAN, NAN, NAN, NAN],
    ]
    found = by_node(["a", "a", "b"], readings)
    assert found["a"] == {
        "cpu_percent": 52.0, "memory_percent": 10.0, "shm_percent": 1.0, "rss_gb": 5.0, "gpu_percent": 90.0,
        "gpu_memory_gb": 75.0, "gpu_peak_gb": 61.0, "gpu_watts": 700.0,
    }  # fmt: skip
    assert found["b"] == {"cpu_percent": 5.0, "memory_percent": 20.0, "rss_gb": 1.0}
