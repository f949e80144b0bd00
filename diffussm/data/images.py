"""Image sources: Twemoji, Fashion-MNIST and folders, behind one interface.

A source is a list of items in a fixed order, with ids 0 .. n-1 and labels 0 .. k-1, and a function that turns an item
into a square RGB picture. Nothing is decoded before `load`.
"""

from __future__ import annotations

import abc
import gzip
import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from diffussm.config.schema import DataConfig, Source
from diffussm.data import twemoji
from diffussm.errors import DataError

Pixels = npt.NDArray[np.uint8]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
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
_FASHION_MNIST_SIDE_PX = 28
_NAMES_SHOWN = 20


class CorruptImageError(DataError):
    """One image cannot be decoded; `data.on_corrupt` decides what follows."""


@dataclass(frozen=True)
class Item:
    """One picture of a source: `id` is its position, `name` says where it comes from, `label` indexes `classes`."""

    id: int
    name: str
    label: int


class ImageSource(abc.ABC):
    """Labelled pictures in a fixed order.

    Attributes:
        classes: class names; a label is an index into them.
        resolution_px: side of the pictures that `load` returns.
        credit: line to be shown under pictures of this source; empty when none is due.
    """

    credit: str = ""

    def __init__(self, classes: Sequence[str], entries: Sequence[tuple[str, int]], cfg: DataConfig) -> None:
        """Take `entries` of (name, label), cut to `cfg.limit`; raise DataError when a class has no picture."""
        if cfg.resolution_px < 1:
            raise DataError(f"data.resolution_px: found {cfg.resolution_px}; allowed are whole numbers from 1 on")
        self.classes = list(classes)
        self.resolution_px = cfg.resolution_px
        # Item ids are positions after the cut; the entry behind each id is kept for `load`.
        self._entry_of = _first_in_turn([label for _, label in entries], cfg.limit)
        self._items = [Item(i, *entries[entry]) for i, entry in enumerate(self._entry_of)]
        present = {item.label for item in self._items}
        empty = [name for label, name in enumerate(self.classes) if label not in present]
        if not self.classes or empty:
            found = f"no pictures of {_listed(empty)}" if empty else "no classes"
            raise DataError(
                f"data.source={cfg.source.value}: found {found}; each class needs at least one picture",
                "name other classes in data.classes, add pictures, or raise data.limit",
            )

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    @abc.abstractmethod
    def load(self, item: Item) -> Pixels:
        """The picture as (resolution_px, resolution_px, 3) uint8 RGB; raises CorruptImageError if undecodable."""


class FileSource(ImageSource):
    """Pictures that lie in files of their own."""

    def __init__(
        self, classes: Sequence[str], files: Sequence[tuple[str, int, Path]], cfg: DataConfig, credit: str = ""
    ) -> None:
        """Take `files` of (name, label, path)."""
        super().__init__(classes, [(name, label) for name, label, _ in files], cfg)
        self._paths = [path for _, _, path in files]
        self.credit = credit

    def load(self, item: Item) -> Pixels:
        """The picture, centre-cropped; raises CorruptImageError if undecodable, DataError if unreadable."""
        path = self._paths[self._entry_of[item.id]]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror or error})", "check that the file exists and is readable"
            ) from error
        try:
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(center_crop(to_rgb(image), self.resolution_px))
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
            # Pillow's plug-ins raise any of these on broken files.
            raise CorruptImageError(
                f"{path}: cannot be decoded ({error})", "repair or remove the file, or set data.on_corrupt=skip"
            ) from error


class FashionMnistSource(ImageSource):
    """The 70,000 pictures of Fashion-MNIST: the 60,000 of the training files, then the 10,000 of the test files."""

    def __init__(self, cfg: DataConfig) -> None:
        """Read the four gzipped IDX files below `cfg.images`; raise DataError when one is missing or malformed."""
        folder = Path(cfg.images) if cfg.images else FASHION_MNIST_FOLDER
        side = _FASHION_MNIST_SIDE_PX
        images, labels, entries = [], [], []
        wanted = _label_map(FASHION_MNIST_CLASSES, cfg.classes)
        for part in ("train", "t10k"):
            images.append(_read_idx(folder / f"{part}-images-idx3-ubyte.gz", dimensions=3))  # (n, 28, 28)
            labels.append(_read_idx(folder / f"{part}-labels-idx1-ubyte.gz", dimensions=1))  # (n,)
            if images[-1].shape != (len(labels[-1]), side, side) or labels[-1].max(initial=0) > 9:
                raise DataError(
                    f"{folder}: the {part} files do not belong together: images {images[-1].shape}, "
                    f"labels {labels[-1].shape}; allowed are (n, {side}, {side}) and (n,) with labels 0 to 9",
                    "fetch the files again",
                )
            entries += [(f"{part}/{i}", int(label)) for i, label in enumerate(labels[-1])]
        kept = [(row, name, wanted[label]) for row, (name, label) in enumerate(entries) if label in wanted]
        super().__init__(cfg.classes or FASHION_MNIST_CLASSES, [(name, label) for _, name, label in kept], cfg)
        self._rows = [row for row, _, _ in kept]
        self._images = np.concatenate(images)  # (n, 28, 28)

    def load(self, item: Item) -> Pixels:
        """The picture as RGB, with a black border of 2 px (28 -> 32 px), resized when another side is asked for."""
        grey = np.pad(self._images[self._rows[self._entry_of[item.id]]], 2)  # (32, 32)
        image = Image.fromarray(grey).convert("RGB")
        if image.size != (self.resolution_px, self.resolution_px):
            image = image.resize((self.resolution_px, self.resolution_px), Image.Resampling.BICUBIC)
        return np.asarray(image)


def open_source(cfg: DataConfig) -> ImageSource:
    """The source that `cfg` names.

    Raises:
        DataError: missing folder, no classes, a class without pictures, an unknown or ambiguous class name.
        MissingError: the package that holds the pictures is not installed.
    """
    if cfg.source is Source.twemoji:
        classes, pictures = twemoji.select(cfg.classes)
        return FileSource(classes, [(p.name, label, p.path) for p, label in pictures], cfg, twemoji.CREDIT)
    if cfg.source is Source.fashion_mnist:
        return FashionMnistSource(cfg)
    return _folder_source(cfg)


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` upright (EXIF orientation applied) and in mode RGB; what is transparent becomes white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit grey at 255 instead of scaling it.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, side_px: int) -> Image.Image:
    """The central square of `image` at `side_px`, by the recipe of ADM (arXiv 2105.05233, `image_datasets.py`).

    Halve with a box filter while the short side is at least twice the wanted one, then resize bicubically so that the
    short side fits, then crop. Box halving keeps the bicubic step from aliasing.
    """
    while min(image.size) >= 2 * side_px:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side_px / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side_px) // 2, (image.height - side_px) // 2
    return image.crop((left, top, left + side_px, top + side_px))


def _folder_source(cfg: DataConfig) -> ImageSource:
    root = Path(cfg.images)
    if not cfg.images or not root.is_dir():
        raise DataError(
            f"data.images: found {cfg.images!r}, which is no folder; source=folder needs one with a sub-folder a class",
            "set data.images to that folder",
        )
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(
            f"data.images: {root} has no sub-folders, so there are zero classes; at least one is needed",
            "put the pictures of each class into a sub-folder of their own",
        )
    wanted = _label_map(names, cfg.classes)
    files = []
    for position, name in enumerate(names):
        if position in wanted:
            found = (p for p in (root / name).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            files += [(p.relative_to(root).as_posix(), wanted[position], p) for p in sorted(found)]
    return FileSource(cfg.classes or names, files, cfg)


def _label_map(available: Sequence[str], wanted: Sequence[str]) -> dict[int, int]:
    """Position in `available` -> label; the order of `wanted` gives the labels, empty takes all as they are."""
    if not wanted:
        return {i: i for i in range(len(available))}
    unknown = [name for name in wanted if name not in available]
    twice = sorted({name for name in wanted if wanted.count(name) > 1})
    if unknown or twice:
        problem = f"found {_listed(unknown)}" if unknown else f"{_listed(twice)} named twice"
        raise DataError(
            f"data.classes: {problem}; allowed are {_listed(available)}", "take names of that list, each once"
        )
    return {available.index(name): label for label, name in enumerate(wanted)}


def _first_in_turn(labels: Sequence[int], limit: int) -> list[int]:
    """Positions of the first `limit` entries when classes take turns (all for 0), in the entries' own order."""
    if limit < 0:
        raise DataError(f"data.limit: found {limit}; allowed are 0 (all) and positive numbers")
    if limit == 0:
        return list(range(len(labels)))
    seen: dict[int, int] = {}
    turns = []
    for position, label in enumerate(labels):
        turns.append((seen.setdefault(label, 0), label, position))
        seen[label] += 1
    return sorted(position for _, _, position in sorted(turns)[:limit])


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


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def picture_batches(source: ImageSource, size: int) -> Iterator[Pixels]:
    """All pictures that can be decoded, in the source's order, as (B, H, W, 3) uint8 with B <= size."""
    batch: list[Pixels] = []
    for item in source:
        try:
            batch.append(source.load(item))
        except CorruptImageError:
            continue  # named and counted when the latents were made
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)
