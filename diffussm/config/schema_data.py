"""Sections about images and latents; `schema.py` takes them in, and its docstring holds here too."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Source(Enum):
    """Where training images come from."""

    twemoji = "twemoji"
    fashion_mnist = "fashion-mnist"
    folder = "folder"
    tar = "tar"
    parquet = "parquet"


class Stored(Enum):
    """What a shard keeps of each picture's posterior."""

    moments = "moments"
    sample = "sample"


class OnCorrupt(Enum):
    """What to do with an image that cannot be decoded."""

    skip = "skip"
    fail = "fail"


class Precision(Enum):
    """Arithmetic of the dense layers; state-space parameters are fp32 always."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class DataConfig:
    """Images, autoencoder and the latents made of them."""

    source: Source = Source.twemoji
    """Images to train on: twemoji, fashion_mnist, folder, tar (WebDataset shards) or parquet (Hugging Face)."""
    images: str = ""
    """Folder or s3:// URL of the images; shards also as train-{000..146}.tar or a glob; fashion_mnist: of its files."""
    labels: str = ""
    """File with the class of each image (source=folder): .csv, .tsv, .jsonl, .json, .txt; empty: the sub-folder."""
    image_column: str = ""
    """Column of the image bytes (source=parquet); empty looks for a usual name."""
    label_column: str = ""
    """Column or key of the class (parquet, .json in a tar, labels file); empty looks for a usual name."""
    latents: str = MISSING
    """Folder or s3:// URL of the latent shards; made by `diffussm prepare` when absent."""
    more: list[str] = field(default_factory=list)
    """Further sets of latents to train on side by side, as RESOLUTION=PLACE, for example 512=s3://bucket/latents-512."""
    resolution_px: int = 256
    """Side of the square images after the centre crop; a multiple of the autoencoder's downsampling."""
    classes: list[str] = field(default_factory=list)
    """Class names to keep, in label order; empty keeps all classes of the source."""
    limit: int = 0
    """Use at most this many images (the first ones, classes in turn); 0 uses all."""
    autoencoder: str = "builtin:emoji-32"
    """Frozen VAE: builtin:NAME (weights in the package) or a diffusers folder or hub id (KL, Tiny or DC)."""
    encoder_precision: Precision = Precision.fp32
    """Arithmetic of the encoder when latents are made: fp32 or bf16."""
    stored: Stored = Stored.moments
    """Keep mean and deviation of the posterior (moments; a fresh sample each epoch) or one sample drawn once."""
    on_corrupt: OnCorrupt = OnCorrupt.skip
    """An image that cannot be decoded is skipped, named and counted (skip) or stops the command (fail)."""
    shard_bytes: int = 1 << 26
    """Upper bound of one latent shard before a new one is begun."""
    flip: bool = True
    """Use the mirrored image of a sample with probability one half."""
    cache: str = ""
    """Local folder for shards fetched from a bucket; empty: a folder of this attempt that is removed at the end."""
    loader_workers: int = 0
    """Background processes that read shards on each rank; 0 reads in the training process."""
    cache_limit_bytes: int = 0
    """Bytes that a node's cache may hold, at least those in use at once; 0: all latents, or what the disk holds."""
    predownload_images: int = 0
    """Images of each rank whose shards are fetched ahead; 0: eight batches, or its share of a shuffle block."""
    store_deadline_s: float = 300.0
    """Seconds that a step waits for a shard while the store is away; then the run stops and names shard and rank."""
    canonical_nodes: int = 1
    """Rows that samples are dealt out to, a divisor of train.global_batch; fixes their order; frozen once started."""
    shuffle_block_images: int = 4096
    """Images within which the order is shuffled; frozen after the first start."""


@dataclass
class PrepareConfig:
    """How latents are made; what they are is in `data`."""

    workers: int = 0
    """Ray workers that encode; 0 works in this process, with the same result."""
    cpus_per_worker: float = 1
    """CPU cores Ray reserves for each worker."""
    gpus_per_worker: float = 0
    """GPUs of each worker, or a part of one; 0 encodes on the CPU. Without workers a GPU is used if there is one."""
    threads_per_worker: int = 1
    """Threads of the encoder on the CPU; results may differ in the last bit between numbers."""
    decode_threads: int = 4
    """Threads that fetch and decode images ahead of each worker's encoder."""
    unit_images: int = 1024
    """Images of one unit of work, which a killed worker may lose; each unit has shards of its own."""
    batch: int = 0
    """Images in one pass of the encoder; 0: 64 at 256 px and below, fewer above."""
    max_failures: int = 20
    """Workers that may be lost before the command stops with `infrastructure`."""
