"""One picture from its encoded bytes: upright, RGB, square. Odd ones are converted and noted, or refused by kind."""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from diffussm.errors import DataError

Pixels = npt.NDArray[np.uint8]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif")

_ORIENTATION = 0x0112
_WIDE_MODES = ("I", "F")
"""32 bits a value: how they map to 8 bits is not written in the file."""


class CorruptImageError(DataError):
    """One image cannot be decoded; `data.on_corrupt` decides what follows. `kind` is one word for reports."""

    def __init__(self, message: str, remedy: str = "", kind: str = "undecodable") -> None:
        super().__init__(message, remedy)
        self.args = (message, remedy, kind)  # so that it survives pickling
        self.kind = kind


@dataclass(frozen=True)
class Decoded:
    """A square RGB picture and what had to be done to it."""

    pixels: Pixels
    """(side, side, 3) uint8."""
    converted: tuple[str, ...]
    """Words for the report: orientation, grey, cmyk, palette, alpha, 16-bit, animated."""


def decode(data: bytes, side_px: int, name: str) -> Decoded:
    """Decode an encoded picture and crop it to (side_px, side_px, 3).

    Of an animated picture the first frame is taken; see `to_rgb` for the rest.

    Raises:
        CorruptImageError: naming `name`, with the kind `empty`, `truncated`, `no-image`, `too-large`, `depth` or
            `undecodable`.
    """
    remedy = "repair or remove the picture, or set data.on_corrupt=skip"
    if not data:
        raise CorruptImageError(f"{name}: is empty", remedy, "empty")
    try:
        with warnings.catch_warnings():
            # Half of the size at which Pillow refuses; such pictures are decoded without a word.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                converted = oddities(image)
                if image.mode in _WIDE_MODES:
                    raise CorruptImageError(
                        f"{name}: has 32 bits a value (mode {image.mode}); 8 and 16 are read", remedy, "depth"
                    )
                return Decoded(np.asarray(center_crop(to_rgb(image), side_px)), converted)
    except UnidentifiedImageError as error:
        raise CorruptImageError(f"{name}: cannot be decoded: no known image format", remedy, "no-image") from error
    except Image.DecompressionBombError as error:
        raise CorruptImageError(f"{name}: cannot be decoded ({error})", remedy, "too-large") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error) as error:
        # Pillow's plug-ins raise any of these on broken files.
        kind = "truncated" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "undecodable"
        raise CorruptImageError(f"{name}: cannot be decoded ({error})", remedy, kind) from error


def oddities(image: Image.Image) -> tuple[str, ...]:
    """Words for everything about an opened image that `to_rgb` changes."""
    found = []
    if image.getexif().get(_ORIENTATION, 1) not in (0, 1):
        found.append("orientation")
    if getattr(image, "is_animated", False):
        found.append("animated")
    if image.mode.startswith("I;16"):
        found.append("16-bit")
    elif image.mode in ("1", "L", "LA", "La"):
        found.append("grey")
    elif image.mode in ("P", "PA"):
        found.append("palette")
    elif image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        found.append(image.mode.lower())
    if image.has_transparency_data:
        found.append("alpha")
    return tuple(found)


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
