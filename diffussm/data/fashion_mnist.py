"""The 70,000 pictures of Fashion-MNIST: the 60,000 of the training files, then the 10,000 of the test files."""

from __future__ import annotations

import functools
import gzip
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffussm.config.schema import DataConfig
from diffussm.data.picture import Decoded
from diffussm.data.source import Entry, ImageSource, Item, Reader, Where, label_map
from diffussm.errors import DataError

FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_SIDE_PX = 28


class FashionMnistReader(Reader):
    """Rows of the two image files, which are unpacked once in each process."""

    def open(self, items: Sequence[Item]) -> Callable[[Item], bytes]:
        """`first` of an item's place is its row."""
        return lambda item: _images(Path(item.where.file))[item.where.first].tobytes()

    def decode(self, data: bytes, side_px: int, name: str) -> Decoded:
        """The picture as RGB, with a black border of 2 px (28 -> 32 px), resized when another side is asked for."""
        grey = np.pad(np.frombuffer(data, np.uint8).reshape(_SIDE_PX, _SIDE_PX), 2)  # (32, 32)
        image = Image.fromarray(grey).convert("RGB")
        if image.size != (side_px, side_px):
            image = image.resize((side_px, side_px), Image.Resampling.BICUBIC)
        return Decoded(np.asarray(image), ())


def open_fashion_mnist(cfg: DataConfig) -> ImageSource:
    """Read the four gzipped IDX files below `cfg.images`; raise DataError when one is missing or malformed."""
    folder = Path(cfg.images) if cfg.images else FOLDER
    wanted = label_map(CLASSES, cfg.classes)
    entries = []
    for part in ("train", "t10k"):
        file = folder / f"{part}-images-idx3-ubyte.gz"
        images = _images(file)  # (n, 28, 28)
        labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", dimensions=1)  # (n,)
        if images.shape != (len(labels), _SIDE_PX, _SIDE_PX) or labels.max(initial=0) > 9:
            raise DataError(
                f"{folder}: the {part} files do not belong together: images {images.shape}, "
                f"labels {labels.shape}; allowed are (n, {_SIDE_PX}, {_SIDE_PX}) and (n,) with labels 0 to 9",
                "fetch the files again",
            )
        entries += [
            Entry(f"{part}/{i}", wanted[label], Where(str(file), i))
            for i, label in enumerate(labels.tolist())
            if label in wanted
        ]
    return ImageSource(cfg, cfg.classes or CLASSES, entries, FashionMnistReader())


def _images(path: Path) -> npt.NDArray[np.uint8]:
    """The pictures of one file, kept for as long as the file does not change."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        changed = 0  # reading it names what is wrong
    return _unpacked(path, changed)


@functools.lru_cache(maxsize=2)
def _unpacked(path: Path, changed: int) -> npt.NDArray[np.uint8]:
    return _read_idx(path, dimensions=3)


def _read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Array of a gzipped IDX file of unsigned bytes: magic 00 00 08 d, then d sizes as big-endian 32-bit numbers."""
    try:
        data = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"data.source=fashion-mnist: {path} is missing",
            "on Debian: apt-get install dataset-fashion-mnist; elsewhere set data.images to the IDX files' folder",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})", "fetch the file again") from error
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path}: is no IDX file of bytes in {dimensions} dimensions", "fetch the file again")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    values = np.frombuffer(data, np.uint8, offset=start)
    if values.size != int(np.prod(shape)):
        raise DataError(f"{path}: promises shape {shape} and holds {values.size} bytes", "fetch the file again")
    return values.reshape(shape)
