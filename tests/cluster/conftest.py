"""One trained run for all tests of evaluation: training it takes longer than most of them."""

from __future__ import annotations

import pytest

from diffussm.config.schema import Config
from tests.evaluations import scored_run


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of 8 batches with a checkpoint each 2; tests may delete its evaluations."""
    return scored_run(tmp_path_factory.mktemp("scored"))
