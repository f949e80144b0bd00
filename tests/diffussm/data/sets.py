"""Small inputs for the tests of this room: picture folders, IDX files, an untrained autoencoder, configs."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
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
            images=str(images),
            latents=latents,
            resolution_px=8,
            autoencoder=str(autoencoder),
            **({"source": Source.folder, "shuffle_block_images": 32, "shard_bytes": 4096} | data),
        ),
        train=TrainConfig(images=1, global_batch=global_batch),
    )


def tar_shards(folder: Path, out: Path, per_shard: int = 7, form: str = "folder") -> Path:
    """The pictures of a class folder as WebDataset shards, the class as `folder`, `cls` or `json`."""
    out.mkdir(parents=True)
    classes = sorted(p.name for p in folder.iterdir())
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for start in range(0, len(files), per_shard):
        with tarfile.open(out / f"train-{start // per_shard:03}.tar", "w") as tar:
            for file in files[start : start + per_shard]:
                label = file.relative_to(folder).parts[0]
                stem = f"{label}/{file.stem}" if form == "folder" else f"{label}-{file.stem}"
                members = [(file.suffix, file.read_bytes())]
                if form == "cls":
                    members.append((".cls", str(classes.index(label)).encode()))
                elif form == "json":
                    members.insert(0, (".json", json.dumps({"label": label, "width": 3}).encode()))
                for ending, content in members:
                    info = tarfile.TarInfo(stem + ending)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return out


def parquet_files(folder: Path, out: Path, per_file: int = 20, per_group: int = 6) -> Path:
    """The pictures of a class folder as Hugging Face writes them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.mkdir(parents=True)
    classes = sorted(p.name for p in folder.iterdir())
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    feature = {"label": {"names": classes, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    for start in range(0, len(files), per_file):
        part = files[start : start + per_file]
        images = pa.array(
            [{"bytes": f.read_bytes(), "path": f.name} for f in part],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
        labels = pa.array([classes.index(f.relative_to(folder).parts[0]) for f in part], pa.int64())
        table = pa.table({"image": images, "label": labels})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
        pq.write_table(table, out / f"train-{start // per_file:05}.parquet", row_group_size=per_group)
    return out


def deterministic_autoencoder(folder: Path, kind: str) -> Path:
    """An untrained AutoencoderTiny (downsampling 4) or AutoencoderDC (downsampling 4) as a diffusers folder."""
    import diffusers
    import torch

    torch.manual_seed(0)
    if kind == "AutoencoderTiny":
        network = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4, 4, 4), decoder_block_out_channels=(4, 4, 4),
            num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), latent_channels=3, scaling_factor=0.5,
        )  # fmt: skip
    else:
        network = diffusers.AutoencoderDC(
            latent_channels=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
            encoder_block_out_channels=(4, 8, 8), decoder_block_out_channels=(4, 8, 8),
            encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()), scaling_factor=0.5,
        )  # fmt: skip
    network.save_pretrained(folder)
    return folder
