from __future__ import annotations

import pytest
import torch

from diffussm.bench.parts import bench_parts


def test_the_parts_of_each_backend_add_up() -> None:
    rows = bench_parts(16, 2, 8, backends=["torch", "reference"], rounds=2, device=torch.device("cpu"))
    assert [row.part for row in rows if row.backend == "torch"] == [
        "kernels", "convolution", "convolution backward", "kernels backward",
    ]  # fmt: skip
    for name in ("torch", "reference"):
        assert sum(row.share for row in rows if row.backend == name) == pytest.approx(1)
    assert all(0 < row.ms_low <= row.ms <= row.ms_high for row in rows)
