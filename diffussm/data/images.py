"""Image sources behind one interface: Twemoji, Fashion-MNIST, folders, tar shards and Parquet."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from diffussm.config.schema import DataConfig, Source
from diffussm.data import twemoji
from diffussm.data.fashion_mnist import CLASSES as FASHION_MNIST_CLASSES
from diffussm.data.fashion_mnist import FOLDER as FASHION_MNIST_FOLDER
from diffussm.data.fashion_mnist import open_fashion_mnist
from diffussm.data.folder import open_folder
from diffussm.data.parquet import open_parquet
from diffussm.data.picture import SUFFIXES, CorruptImageError, Pixels, center_crop, to_rgb
from diffussm.data.source import Entry, FileReader, ImageSource, Item, Where
from diffussm.data.tars import open_tars

__all__ = [
    "FASHION_MNIST_CLASSES",
    "FASHION_MNIST_FOLDER",
    "SUFFIXES",
    "CorruptImageError",
    "ImageSource",
    "Item",
    "Pixels",
    "center_crop",
    "open_source",
    "picture_batches",
    "to_rgb",
]


def open_source(cfg: DataConfig) -> ImageSource:
    """The source that `cfg` names; its pictures are listed, none is decoded.

    Raises:
        DataError: missing files, no classes, a class without pictures, an unknown or ambiguous class name.
        MissingError: the package that holds the pictures is not installed.
        StorageError: a bucket cannot be read.
    """
    match cfg.source:
        case Source.twemoji:
            classes, pictures = twemoji.select(cfg.classes)
            entries = [Entry(picture.name, label, Where(str(picture.path))) for picture, label in pictures]
            return ImageSource(cfg, classes, entries, FileReader(), credit=twemoji.CREDIT)
        case Source.fashion_mnist:
            return open_fashion_mnist(cfg)
        case Source.folder:
            return open_folder(cfg)
        case Source.tar:
            return open_tars(cfg)
        case Source.parquet:
            return open_parquet(cfg)


def picture_batches(source: ImageSource, size: int) -> Iterator[Pixels]:
    """All pictures that can be decoded, in the source's order, as (B, H, W, 3) uint8 with B <= size."""
    batch: list[Pixels] = []
    for start in range(0, len(source), size):
        for loaded in source.load_all(source.items[start : start + size]):
            if isinstance(loaded, CorruptImageError):
                continue  # named and counted when the latents were made
            batch.append(loaded)
            if len(batch) == size:
                yield np.stack(batch)
                batch = []
    if batch:
        yield np.stack(batch)
