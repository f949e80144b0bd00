"""What is known of the latents before they exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffussm.config import Config
from diffussm.model.presets import LatentShape
from launch.latent import latent


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    made = Config(name="a")
    made.data.latents, made.data.resolution_px, made.data.classes = str(tmp_path / "latents"), 32, ["x", "y", "z"]
    return made


def test_it_follows_from_the_built_in_autoencoder(cfg: Config) -> None:
    known = latent(cfg)
    assert known is not None
    assert known.shape == LatentShape(channels=4, height=8, width=8, classes=3)
    assert known.counted


def test_it_follows_from_a_folder(cfg: Config, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [1] * 4, "latent_channels": 16}))
    cfg.data.autoencoder, cfg.data.resolution_px = str(tmp_path / "vae"), 256
    known = latent(cfg)
    assert known is not None
    assert (known.shape.channels, known.shape.height, known.shape.width) == (16, 32, 32)


def test_the_recipes_autoencoder_is_known_without_a_network(cfg: Config) -> None:
    cfg.data.autoencoder, cfg.data.resolution_px, cfg.data.classes = "stabilityai/sd-vae-ft-ema", 512, []
    cfg.plan.dataset_classes, cfg.plan.dataset_images = 1000, 500
    known = latent(cfg)
    assert known is not None
    assert known.shape == LatentShape(4, 64, 64, 1000)
    assert (known.counted, known.images) == (True, 500)
    cfg.plan.dataset_classes, cfg.data.limit = 0, 20
    known = latent(cfg)
    assert known is not None
    assert (known.counted, known.shape.classes, known.images) == (False, 1, 20)


def test_latents_that_exist_speak_for_themselves(cfg: Config, tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    passport = {"latent_shape": [8, 4, 6], "classes": ["a", "b"], "number": 77}
    (tmp_path / "latents" / "passport.json").write_text(json.dumps(passport))
    for place in (tmp_path / "latents", f"file://{tmp_path}/latents"):
        cfg.data.latents = str(place)
        known = latent(cfg)
        assert known is not None
        assert known.shape == LatentShape(channels=8, height=4, width=6, classes=2)
        assert known.images == 77


def test_an_unknown_autoencoder_leaves_it_open(cfg: Config) -> None:
    cfg.data.autoencoder = "owner/some-vae"
    assert latent(cfg) is None


def test_a_sample_takes_the_bytes_that_are_written(cfg: Config) -> None:
    """Held against what `diffussm.data.encode` writes for each image."""
    import numpy as np

    from diffussm.data import latents

    known = latent(cfg)
    assert known is not None
    assert known.sample_bytes == len(latents.MOMENTS) * np.dtype(np.float16).itemsize * 4 * 8 * 8
