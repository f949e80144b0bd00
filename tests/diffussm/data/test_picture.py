"""Odd pictures as files: each is converted and noted, or refused with its kind. test_images.py has the plain ones."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffussm.data.picture import CorruptImageError, center_crop, decode

RED, GREEN = (255, 0, 0), (0, 255, 0)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(), "JPEG", exif=exif, quality=95)


ODD = {
    "plain": (encoded(noise()), ()),
    "webp": (encoded(noise(), "WEBP", lossless=True), ()),
    "turned": (turned(), ("orientation",)),
    "grey": (encoded(noise().convert("L")), ("grey",)),
    "bilevel": (encoded(noise().convert("1")), ("grey",)),
    "grey with alpha": (encoded(Image.new("LA", (20, 20), (0, 0))), ("grey", "alpha")),
    "alpha": (encoded(Image.new("RGBA", (20, 20), (*RED, 0))), ("alpha",)),
    "palette": (encoded(noise().quantize(16)), ("palette",)),
    "transparent palette": (encoded(noise().quantize(16), transparency=3), ("palette", "alpha")),
    "cmyk": (encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG"), ("cmyk",)),
    "16 bits": (encoded(Image.fromarray(np.full((20, 20), 0x8000, np.uint16))), ("16-bit",)),
    "16 bits in a tiff": (encoded(Image.fromarray(np.full((20, 20), 0x8000, np.uint16)), "TIFF"), ("16-bit",)),
    "animated": (
        encoded(
            Image.new("RGB", (20, 20), RED), "GIF", save_all=True,
            append_images=[Image.new("RGB", (20, 20), GREEN)],
        ),
        ("animated", "palette"),
    ),
    "animated webp": (
        encoded(
            Image.new("RGB", (20, 20), RED), "WEBP", save_all=True, lossless=True,
            append_images=[Image.new("RGB", (20, 20), GREEN)],
        ),
        ("animated",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_odd_pictures_become_square_rgb_and_are_noted(kind: str) -> None:
    data, converted = ODD[kind]
    decoded = decode(data, 16, kind)
    assert decoded.pixels.shape == (16, 16, 3)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.converted == converted


def test_their_colours_are_right() -> None:
    def corner(kind: str) -> list[int]:
        return decode(ODD[kind][0], 16, "").pixels[3, 3].tolist()

    assert corner("animated") == corner("animated webp") == [255, 0, 0]  # the first frame
    assert corner("cmyk") == pytest.approx([255, 0, 0], abs=3)
    assert corner("16 bits") == corner("16 bits in a tiff") == [128] * 3
    assert corner("alpha") == corner("grey with alpha") == [255] * 3
    upright = np.asarray(
        center_crop(Image.open(io.BytesIO(turned())).convert("RGB").transpose(Image.Transpose.ROTATE_270), 16)
    )
    assert np.array_equal(decode(turned(), 16, "").pixels, upright)


JPEG = encoded(noise(200, 200), "JPEG")
REFUSED = {
    "nothing": (b"", "empty"),
    "text": (b"<html>404 Not Found</html>", "no-image"),
    "a cut jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "a cut png": (encoded(noise(200, 200))[:5000], "truncated"),
    "only a head": (JPEG[:300], "truncated"),
    "32 bits": (encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "depth"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_decoded_is_refused_by_kind_and_name(kind: str) -> None:
    data, word = REFUSED[kind]
    with pytest.raises(CorruptImageError, match=r"^a/b\.jpg: ") as caught:
        decode(data, 16, "a/b.jpg")
    assert caught.value.kind == word
    assert caught.value.remedy
    # It travels between processes as it is.
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
    assert (again.message, again.remedy, again.kind) == (caught.value.message, caught.value.remedy, word)


def test_a_bomb_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(CorruptImageError) as caught:
        decode(encoded(noise(60, 60)), 16, "x")
    assert caught.value.kind == "too-large"


@pytest.mark.parametrize(("width", "height", "side"), [(501, 375, 64), (375, 500, 64), (64, 64, 64), (130, 70, 64)])
def test_the_crop_is_adms_step_by_step(width: int, height: int, side: int) -> None:
    """Written out from the recipe: BOX halvings, BICUBIC to the short side, then the middle of the array."""
    image = noise(width, height)
    expected = image
    while min(expected.size) >= 2 * side:
        expected = expected.resize(tuple(x // 2 for x in expected.size), resample=Image.BOX)  # type: ignore[arg-type]
    scale = side / min(expected.size)
    pixels = np.array(expected.resize(tuple(round(x * scale) for x in expected.size), resample=Image.BICUBIC))  # type: ignore[arg-type]
    y, x = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    assert np.array_equal(np.asarray(center_crop(image, side)), pixels[y : y + side, x : x + side])
