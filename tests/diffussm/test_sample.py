from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffussm.checkpoint import weights
from diffussm.checkpoint.store import open_store
from diffussm.data.latents import passport
from diffussm.data.passport import Passport
from diffussm.errors import ConfigError, DataError
from diffussm.model import build_model
from diffussm.sample import Painter, grid_labels, proportional_labels
from tests.runs import tiny_run

PASSPORT = Passport(
    source="folder", wanted_classes=(), limit=0, resolution_px=32, crop="adm-center", classes=("cat", "dog", "flag"),
    class_counts=(1, 1, 2), number=4, skipped=(), credit="", autoencoder="a", autoencoder_digest="d", downsampling=4,
    scaling_factor=1.0, shift=0.0, dtype="float16", latent_shape=(4, 8, 8), latent_mean=0.0, latent_std=1.0,
    index_digest="i",
)  # fmt: skip


def test_rows_are_the_classes_asked_for_in_that_order() -> None:
    assert grid_labels(PASSPORT, [], 2) == (["cat", "dog", "flag"], [0, 0, 1, 1, 2, 2])
    assert grid_labels(PASSPORT, ["flag", "cat"], 1) == (["flag", "cat"], [2, 0])
    with pytest.raises(ConfigError, match=r"found cow.*allowed: cat, dog, flag"):
        grid_labels(PASSPORT, ["cat", "cow"], 1)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.integers(1, 300))
def test_labels_keep_the_proportions(counts: list[int], n: int) -> None:
    labels = proportional_labels(counts, n)
    assert len(labels) == n
    for label, count in enumerate(counts):
        assert abs(labels.count(label) - n * count / sum(counts)) < 1


def test_labels_are_mixed_so_that_any_stretch_has_all_classes() -> None:
    labels = proportional_labels((100, 100, 200), 40)
    assert set(labels[:8]) == {0, 1, 2}
    assert replace(PASSPORT).latent.classes == 3


def test_a_file_of_weights_is_drawn_from_instead_of_a_checkpoint(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path)
    made = passport(cfg.data.latents)
    torch.manual_seed(3)
    model = build_model(cfg.model, made.latent)
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    cfg.sample.weights = str(tmp_path / "w.safetensors")
    weights.write(cfg.sample.weights, shapes, lambda name, s, n: state[name].flatten()[s : s + n], 640, {})
    store = open_store(str(tmp_path / "no-run"))
    painter = Painter.load(cfg, store, made)
    assert painter.images == 640
    for name, tensor in painter.model.state_dict().items():
        assert torch.equal(tensor.cpu(), state[name]), name
    with pytest.raises(ConfigError, match="--checkpoint: found 8 and sample"):
        Painter.load(cfg, store, made, images=8)
    other = {name: (1, *shape) for name, shape in shapes.items()}
    weights.write(cfg.sample.weights, other, lambda name, s, n: torch.zeros(n), 640, {})
    with pytest.raises(DataError, match="does not fit the model"):
        Painter.load(cfg, store, made)
