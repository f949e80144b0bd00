"""The reader against the others, in a bucket, on few samples."""

from __future__ import annotations

import multiprocessing
import signal
import time
from pathlib import Path

import pytest

from diffussm.bench.data import SIDES, _expect_alive, bench_data
from diffussm.errors import InfrastructureError, StorageError
from tests.runs import tiny_run
from tests.s3 import S3Server


def test_all_sides_read_the_same_set_and_leave_nothing(tmp_path: Path, s3_server: S3Server) -> None:
    cfg = tiny_run(tmp_path)
    url = s3_server.url("bench")
    rows = bench_data(cfg, url, ranks=[2], samples=160, rounds=2, train_samples_per_s=50.0)
    assert [(row.side, row.ranks) for row in rows] == [(side, 2) for side in SIDES]
    for row in rows:
        assert 0 < row.low <= row.samples_per_s <= row.high
        assert row.over_training == pytest.approx(row.samples_per_s / 50)
        assert row.first_batch_s > 0
    assert rows[1].over_npy == pytest.approx(1)
    assert s3_server.keys("bench") == []


def test_a_url_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        bench_data(tiny_run(tmp_path), "/proc/nowhere", ranks=[1], samples=16, rounds=1, train_samples_per_s=1)


def test_a_rank_that_is_killed_ends_the_measurement_with_a_reason() -> None:
    process = multiprocessing.get_context("spawn").Process(target=signal.pause)
    process.start()
    _expect_alive([process], time.monotonic() + 60)
    with pytest.raises(InfrastructureError, match="in time"):
        _expect_alive([process], time.monotonic() - 1)
    process.kill()
    process.join()
    with pytest.raises(InfrastructureError, match="code -9"):
        _expect_alive([process], time.monotonic() + 60)
