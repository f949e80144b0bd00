"""What all tests share: one thread for each process, no network sinks, ranks on demand."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

# Before torch is imported anywhere: several test processes with several threads each slow each other down manyfold.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["DS_ACCELERATOR"] = "cpu"
# Ray reads its way of authentication once, when it is first imported, by whichever test that is.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
# Ray starts workers at 15: those of one test would stand still while another test works.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - its name

pytest_plugins = ["tests.browser", "tests.distributed", "tests.pods", "tests.s3", "tests.slurm"]

CLUSTERS = ("chaos", "cluster", "e2e", "launch/slurm", "launch/test_slurm.py", "launch/kubernetes")
"""Under tests/: Ray clusters, Slurm daemons and pods, which take longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The clusters start first, so that no worker of `-n 2 --dist loadfile` is left with a long file at the end."""
    here = Path(__file__).parent
    items.sort(key=lambda item: not item.path.relative_to(here).as_posix().startswith(CLUSTERS))
