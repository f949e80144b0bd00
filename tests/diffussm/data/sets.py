"""Small inputs for the tests of this room: picture folders, IDX files, an untrained autoencoder, configs."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffussm.config.schema import Config, DataConfig, Source, TrainConfig


def picture_folder(root: Path, classes: dict[str, int], side: int = 20) -> Path:
    """A folder with so many random PNGs for each class."""
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03}.png")
    return root


def idx(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write a gzipped IDX file."""
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


def tiny_autoencoder(folder: Path, seed: int = 0, **config: Any) -> Path:
    """An untrained AutoencoderKL (downsampling 2, 2 latent channels) as a diffusers folder."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=2,
        mid_block_add_attention=False,
        **({"scaling_factor": 0.5, "shift_factor": 0.25} | config),
    )
    network.save_pretrained(folder)
    return folder


def config(latents: str, images: Path, autoencoder: Path, global_batch: int = 8, **data: Any) -> Config:
    """A config that reads a picture folder at 8 px."""
    return Config(
        name="test",
        data=DataConfig(
            source=Source.folder,
            images=str(images),
            latents=latents,
            resolution_px=8,
            autoencoder=str(autoencoder),
            **({"shuffle_block_images": 32, "shard_bytes": 4096} | data),
        ),
        train=TrainConfig(images=1, global_batch=global_batch),
    )
