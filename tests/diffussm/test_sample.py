from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffussm.checkpoint import weights
from diffussm.checkpoint.store import open_store
from diffussm.config.schema import ModelConfig
from diffussm.data.latents import passport
from diffussm.data.passport import Passport
from diffussm.errors import ConfigError, DataError
from diffussm.model import build_model
from diffussm.sample import Painter, cast_dense, grid_labels, weights_digest
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


def test_of_many_classes_a_grid_shows_some_of_all() -> None:
    many = replace(PASSPORT, classes=tuple(map(str, range(1000))), class_counts=(1,) * 1000, number=1000)
    rows, labels = grid_labels(many, [], 2)
    assert rows == [str(i * 125 // 2) for i in range(16)]
    assert labels == [int(name) for name in rows for _ in range(2)]
    assert len(grid_labels(many, [str(i) for i in range(20)], 1)[0]) == 20  # who names them gets them


def test_the_digest_of_weights_follows_every_number_and_name() -> None:
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    one = weights_digest(weights)
    assert one == weights_digest(dict(reversed(weights.items())))
    assert one != weights_digest({"a": weights["a"].view(3, 2), "b": weights["b"]})
    assert one != weights_digest({"a": weights["a"], "c": weights["b"]})
    assert one != weights_digest({"a": weights["a"] + 1e-6, "b": weights["b"]})


def test_weights_cast_once_give_what_autocast_gives() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(preset="tiny", width=16, depth=2, state=8, backend="torch"), PASSPORT.latent).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(x, t, y)
        cast_dense(model)
        after = model(x, t, y)
    assert torch.equal(before, after)
    kept = {p.dtype for name, p in model.named_parameters() if "ssm" in name}
    assert kept == {torch.float32}
    assert model.stem.weight.dtype == torch.bfloat16


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
