"""Every file in configs/ is a legal config."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffussm.config import check, load
from diffussm.config.explain import table

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
OVERLAYS = sorted(FOLDER.glob("*/*.yaml"))
RECIPES = [path for path in CONFIGS if path.stem.startswith(("imagenet", "lsun"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_loads_passes_the_rules_and_is_named_after_its_file(path: Path) -> None:
    cfg = load(path)
    check(cfg)
    assert cfg.name == path.stem


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_overlay_fits_every_recipe(overlay: Path, recipe: Path) -> None:
    plain, cfg = load(recipe), load(recipe, [str(overlay)])
    check(cfg)
    assert cfg != plain or cfg.model.preset.lower() == overlay.stem
    assert cfg.name == plain.name


@pytest.mark.parametrize("path", [*CONFIGS, *OVERLAYS], ids=lambda path: path.stem)
def test_its_first_line_says_what_it_is_for(path: Path) -> None:
    assert path.read_text().startswith("# ")


def test_the_papers_recipe() -> None:
    cfg = load(next(path for path in CONFIGS if path.stem == "imagenet-256"))
    assert (cfg.model.preset, cfg.model.hourglass, cfg.model.state) == ("XL", 2, 64)
    assert (cfg.train.global_batch, cfg.train.images, cfg.train.lr) == (256, 660_000_000, 1e-4)
    assert (cfg.train.beta1, cfg.train.beta2, cfg.train.weight_decay, cfg.train.ema) == (0.9, 0.999, 0.0, 0.9999)
    assert (cfg.train.warmup_images, cfg.train.decay_images) == (0, 0)
    assert (cfg.diffusion.timesteps, cfg.diffusion.beta_start, cfg.diffusion.beta_end) == (1000, 1e-4, 0.02)
    assert (cfg.diffusion.label_drop, cfg.sample.steps, cfg.sample.guidance) == (0.1, 250, 1.5)
    assert cfg.data.resolution_px == 256


def test_the_papers_recipe_at_512() -> None:
    small, large = (load(FOLDER / f"imagenet-{side}.yaml") for side in (256, 512))
    assert (large.data.resolution_px, large.train.images) == (512, 302_000_000)
    large.name, large.data.resolution_px, large.data.latents = small.name, 256, small.data.latents
    for key in ("images", "micro_batch"):
        setattr(large.train, key, getattr(small.train, key))
    large.checkpoint.every_images = small.checkpoint.every_images
    assert large == small


def test_the_run_that_starts_from_another_has_its_network_and_place() -> None:
    parent, child = load(FOLDER / "imagenet-256.yaml"), load(FOLDER / "imagenet-256-to-512.yaml", ["storage=s3://b/r"])
    assert child.train.start_from == "s3://b/r/imagenet-256"
    assert (child.model, child.diffusion) == (parent.model, parent.diffusion)
    assert child.data.resolution_px == 2 * parent.data.resolution_px


def test_there_is_a_config_for_each_source() -> None:
    assert {load(path).data.source.name for path in CONFIGS} == set(table()["data.source"].choices)
