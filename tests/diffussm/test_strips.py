"""Strips of an untrained but real network: what changes along each of them, and what stays."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm.config.schema import Config, Sampler
from diffussm.data import autoencoder
from diffussm.data.latents import passport
from diffussm.diffusion.process import Process
from diffussm.errors import ConfigError
from diffussm.model import build_model
from diffussm.sample import Painter
from diffussm.strips import between, interpolation, strip, trajectory
from tests.runs import tiny_run


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Painter:
    cfg = tiny_run(tmp_path_factory.mktemp("strips"))
    cfg.sample.steps, cfg.sample.per_class, cfg.sample.guidance = 6, 3, 1.5
    return paint_with(cfg, seed=1)


def paint_with(cfg: Config, seed: int) -> Painter:
    torch.manual_seed(seed)
    made = passport(cfg.data.latents)
    model = build_model(cfg.model, made.latent)
    for parameter in model.head.parameters():  # zero in a fresh network, which would predict nothing
        torch.nn.init.normal_(parameter, std=0.3)
    return Painter(
        cfg=cfg, passport=made, model=model.eval(), process=Process(cfg.diffusion),
        decoder=autoencoder.load(cfg.data.autoencoder), images=8, device=torch.device("cpu"), kind="master",
        manifest=None, digest="",
    )  # fmt: skip


def test_a_trajectory_ends_in_the_picture(painter: Painter) -> None:
    frames = trajectory(painter, [0, 1], 3)
    assert len(frames) == 6
    finished = painter.paint([0, 1])
    assert np.array_equal(frames[2], finished[0])
    assert np.array_equal(frames[5], finished[1])
    assert not np.array_equal(frames[0], frames[2])
    assert len(trajectory(painter, [0], 50)) == painter.cfg.sample.steps


def test_an_interpolation_begins_and_ends_at_the_noise_of_two_pictures(painter: Painter) -> None:
    still = replace(painter, cfg=replace(painter.cfg, sample=replace(painter.cfg.sample, sampler=Sampler.ddim)))
    frames = interpolation(painter, [1], 4)
    assert len(frames) == 4
    ends = still.paint([1, 1])
    assert np.abs(frames[0].astype(int) - ends[0]).max() <= 1  # another batch, at most another rounding
    assert np.abs(frames[3].astype(int) - ends[1]).max() <= 1
    steps = [np.abs(frames[i].astype(int) - frames[i + 1]).mean() for i in range(3)]
    assert all(step > 0 for step in steps)


def test_the_way_between_two_noises_keeps_their_norm() -> None:
    a, b = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.3, 0.5, 1.0):
        norm = float(between(a, b, share).norm())
        assert min(float(a.norm()), float(b.norm())) * 0.98 < norm < max(float(a.norm()), float(b.norm())) * 1.02
    assert torch.allclose(between(a, b, 0.0), a)
    assert torch.allclose(between(a, b, 1.0), b)


def rows_of(png: bytes) -> int:
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    return picture.size[1]


def test_a_guidance_strip_has_a_row_for_each_scale(painter: Painter) -> None:
    few = strip(painter, "guidance", ["cat"], ["1", "3"], load=lambda cfg: painter)
    many = strip(painter, "guidance", ["cat"], ["1", "2", "3", "4"], load=lambda cfg: painter)
    assert rows_of(many) > rows_of(few)


def test_an_ema_strip_loads_each_average_once(painter: Painter) -> None:
    asked: list[str] = []

    def load(cfg: Config) -> Painter:
        asked.append(cfg.sample.ema)
        return paint_with(cfg, seed=len(asked))

    strip(painter, "ema", [], ["none", "plain"], load)
    assert asked == ["none", "plain"]


@pytest.mark.parametrize(
    ("kind", "names", "values", "words"),
    [
        ("film", [], [], "--strip: found 'film'; allowed: trajectory"),
        ("guidance", ["cow"], [], "--classes: found cow; allowed: cat, dog"),
        ("guidance", [], ["much"], "--values: found 'much'"),
        ("guidance", [], ["-1"], "--values: found -1"),
    ],
)
def test_wrong_words_are_refused(painter: Painter, kind: str, names: list[str], values: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        strip(painter, kind, names, values, load=lambda cfg: painter)
