"""The worker that draws a grid, without Ray; test_beside.py has it in a real cluster."""

from __future__ import annotations

import io
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cluster import scoring
from cluster.gallery import NICENESS, Easel
from diffussm.checkpoint.store import LocalStore
from diffussm.config.schema import Config
from diffussm.sample import Painter, paint_grid
from tests.runs import BATCH


def test_it_draws_the_weights_that_were_kept_and_lets_the_training_go_first(
    scored: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    nicer: list[int] = []
    monkeypatch.setattr(os, "nice", nicer.append)
    store = LocalStore(f"{scored.storage}/{scored.name}")
    scoring.keep_weights(scored, store, 4 * BATCH, "samples")
    place = scoring.kept_place(scored, 4 * BATCH, "samples")
    png, credit = Easel().draw(replace(scored, sample=replace(scored.sample, weights=place)))
    assert nicer == [NICENESS]
    assert torch.get_num_threads() == scored.cluster.threads_per_worker
    passport = scoring.checked_passport(scored)
    assert credit == passport.credit
    drawn, old, last = (
        np.asarray(Image.open(io.BytesIO(each)))
        for each in (png, *(paint_grid(Painter.load(scored, store, passport, n * BATCH))[0] for n in (4, 8)))
    )
    assert np.array_equal(drawn, old)
    assert not np.array_equal(drawn, last)
    scoring.release(store, 4 * BATCH, "samples")
