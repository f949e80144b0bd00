"""Every recipe takes a step here: its network narrow and shallow, on pictures of its own size; all else as it is.

What this machine lacks is replaced: ImageNet and LSUN by random pictures, the hub's autoencoder by an untrained one of
the same shape, GPUs by one CPU, the length of the training by one step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffussm.checkpoint import restore
from diffussm.checkpoint.store import open_store
from diffussm.config import Config, check, load
from diffussm.config.schema import Source
from diffussm.data.encode import prepare
from diffussm.train import loop
from diffussm.train.world import current
from tests.diffussm.data import sets
from tests.runs import metrics

CONFIGS = Path(__file__).parents[2] / "configs"
WIDTH, DEPTH = 16, 1
NEEDS_FASHION = pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").exists(), reason="Debian's dataset-fashion-mnist is not installed"
)


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Downsampling 8 to 4 channels, as stabilityai/sd-vae-ft-ema."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        latent_channels=4,
        mid_block_add_attention=False,
        layers_per_block=1,
    )
    folder = tmp_path_factory.mktemp("vae")
    network.save_pretrained(folder)
    return folder


def small(recipe: str, overlay: str, folder: Path, autoencoder: Path) -> Config:
    cfg = load(CONFIGS / f"{recipe}.yaml", [str(CONFIGS / overlay)] if overlay else [])
    pictures = folder / "pictures"
    names = cfg.data.classes or ["a", "b"]
    if not pictures.exists():
        sets.picture_folder(pictures, dict.fromkeys(names, cfg.train.global_batch // len(names)), side=32)
    kept = {Source.tar: sets.tar_shards, Source.parquet: sets.parquet_files}
    images = kept[cfg.data.source](pictures, folder / cfg.data.source.name) if cfg.data.source in kept else pictures
    data = replace(
        cfg.data,
        source=cfg.data.source if cfg.data.source in kept else Source.folder,
        images=str(images),
        latents=str(folder / f"latents-{cfg.data.resolution_px}"),
        autoencoder=str(autoencoder),
    )
    made = replace(
        cfg,
        storage=str(folder / "runs"),
        data=data,
        model=replace(cfg.model, width=WIDTH, depth=DEPTH),
        train=replace(cfg.train, images=cfg.train.global_batch, warmup_images=0),
        cluster=replace(cfg.cluster, workers=1, workers_per_node=0, gpus_per_worker=0),
        prepare=replace(cfg.prepare, workers=0, gpus_per_worker=0),
    )
    if cfg.train.start_from:
        made.train.start_from = f"{made.storage}/imagenet-256"
    check(made)
    prepare(made)
    return made


def step(cfg: Config, folder: Path) -> float:
    world = current(torch.device("cpu"))
    loop.train(cfg, world, attempt=1, scratch=folder / f"scratch-{cfg.name}", announce=lambda record: None)
    return float(metrics(cfg)[-1]["loss"])


@pytest.mark.world_size(1)
def test_imagenet_256(tmp_path: Path, autoencoder: Path) -> None:
    cfg = small("imagenet-256", "", tmp_path, autoencoder)
    assert 0.5 < step(cfg, tmp_path) < 2.0
    _, manifest = restore.choose(open_store(f"{cfg.storage}/{cfg.name}"))
    assert manifest.zero_stage == cfg.train.zero_stage
    assert manifest.kinds == ("master", "exp_avg", "exp_avg_sq", "ema-plain", "ema-power-0.050", "ema-power-0.100")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.world_size(1)
def test_imagenet_512_and_from_256_to_512(tmp_path: Path, autoencoder: Path) -> None:
    parent = small("imagenet-256", "", tmp_path, autoencoder)
    step(parent, tmp_path)
    assert 0.5 < step(small("imagenet-512", "", tmp_path, autoencoder), tmp_path) < 2.0
    child = small("imagenet-256-to-512", "", tmp_path, autoencoder)
    assert 0.5 < step(child, tmp_path) < 2.0
    store = open_store(f"{child.storage}/{child.name}")
    assert store.exists("lineage.json")
    assert restore.choose(store)[1].counters.adam_steps == 2


@pytest.mark.long
@pytest.mark.world_size(1)
@pytest.mark.parametrize("source", [Source.tar, Source.parquet])
def test_imagenet_256_from_other_files(source: Source, tmp_path: Path, autoencoder: Path) -> None:
    cfg = small(f"imagenet-256-{source.name}", "", tmp_path, autoencoder)
    assert cfg.data.source is source
    assert 0.5 < step(cfg, tmp_path) < 2.0


@pytest.mark.long
@pytest.mark.world_size(1)
@pytest.mark.parametrize("recipe", ["quickstart", pytest.param("fashion-mnist", marks=NEEDS_FASHION)])
def test_small_recipes_on_their_own_pictures_and_autoencoder(recipe: str, tmp_path: Path) -> None:
    cfg = load(CONFIGS / f"{recipe}.yaml")
    cfg.storage, cfg.data.latents = str(tmp_path / "runs"), str(tmp_path / "latents")
    cfg.model.width, cfg.model.depth = WIDTH, DEPTH
    cfg.train.images, cfg.train.warmup_images, cfg.train.decay_images = cfg.train.global_batch, 0, 0
    check(cfg)
    prepare(cfg)
    assert 0.5 < step(cfg, tmp_path) < 2.0


@pytest.mark.long
@pytest.mark.world_size(1)
def test_lsun_has_no_guidance_to_learn(tmp_path: Path, autoencoder: Path) -> None:
    cfg = small("lsun-church", "", tmp_path, autoencoder)
    assert 0.5 < step(cfg, tmp_path) < 2.0
    assert (cfg.diffusion.label_drop, cfg.sample.guidance, len(cfg.data.classes)) == (0.0, 1.0, 1)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.world_size(1)
@pytest.mark.parametrize("overlay", sorted(f"{p.parent.name}/{p.name}" for p in CONFIGS.glob("*/*.yaml")))
def test_every_overlay(overlay: str, tmp_path: Path, autoencoder: Path) -> None:
    cfg = small("imagenet-256", overlay, tmp_path, autoencoder)
    assert 0.5 < step(cfg, tmp_path) < 2.0
