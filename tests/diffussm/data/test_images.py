from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffussm.config.schema import DataConfig, Source
from diffussm.data import images, twemoji
from diffussm.errors import DataError
from tests.diffussm.data import sets

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def folder_config(path: Path, **keys: Any) -> DataConfig:
    return DataConfig(**({"source": Source.folder, "images": str(path), "resolution_px": 8} | keys))


def random_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


class TestCrop:
    @given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
    def test_side_is_exact_and_a_plain_colour_stays(self, width: int, height: int, side: int) -> None:
        cropped = images.center_crop(Image.new("RGB", (width, height), (10, 130, 250)), side)
        assert cropped.size == (side, side)
        assert (np.asarray(cropped) == (10, 130, 250)).all()

    @pytest.mark.parametrize(("width", "height"), [(15, 10), (10, 15), (10, 10), (12, 10)])
    def test_picture_with_the_right_short_side_is_only_cut(self, width: int, height: int) -> None:
        image = random_image(width, height)
        top, left = (height - 10) // 2, (width - 10) // 2
        expected = np.asarray(image)[top : top + 10, left : left + 10]
        assert np.array_equal(images.center_crop(image, 10), expected)

    def test_halves_by_box_while_the_short_side_is_twice_the_size(self) -> None:
        image = random_image(64, 64)
        half = np.asarray(image).reshape(32, 2, 32, 2, 3).mean((1, 3)).round()
        quarter = half.reshape(16, 2, 16, 2, 3).mean((1, 3))
        # Each pass rounds half up; a bicubic step from 64 to 16 would differ by far more.
        assert np.abs(np.asarray(images.center_crop(image, 16)) - quarter).max() < 3

    def test_the_rest_is_bicubic(self) -> None:
        image = random_image(72, 72)
        expected = image.resize((36, 36), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(images.center_crop(image, 32), expected)


class TestToRgb:
    def pixel(self, image: Image.Image) -> tuple[int, ...]:
        converted = images.to_rgb(image)
        assert converted.mode == "RGB"
        return converted.getpixel((0, 0))  # type: ignore[return-value]

    def test_transparent_becomes_white_and_half_is_mixed(self) -> None:
        assert self.pixel(Image.new("RGBA", (1, 1), (*RED, 0))) == (255, 255, 255)
        assert self.pixel(Image.new("RGBA", (1, 1), (*RED, 128))) == pytest.approx((255, 127, 127), abs=1)
        assert self.pixel(Image.new("LA", (1, 1), (0, 0))) == (255, 255, 255)

    def test_palette_with_a_transparent_colour(self) -> None:
        image = Image.new("P", (1, 1), 0)
        image.putpalette([*RED, *GREEN])
        assert self.pixel(image) == RED
        image.info["transparency"] = 0
        assert self.pixel(image) == (255, 255, 255)

    def test_grey_cmyk_and_16_bit(self) -> None:
        assert self.pixel(Image.new("L", (1, 1), 77)) == (77, 77, 77)
        assert self.pixel(Image.new("CMYK", (1, 1), (0, 255, 255, 0))) == RED
        assert self.pixel(Image.fromarray(np.full((1, 1), 0x8000, np.uint16))) == (128, 128, 128)

    def test_exif_orientation_is_applied(self, tmp_path: Path) -> None:
        image = Image.new("RGB", (2, 1), RED)
        image.putpixel((1, 0), BLUE)
        exif = Image.Exif()
        exif[0x0112] = 6  # Turn by 90 degrees clockwise to see it upright.
        image.save(tmp_path / "a.png", exif=exif)
        upright = images.to_rgb(Image.open(tmp_path / "a.png"))
        assert upright.size == (1, 2)
        assert upright.getpixel((0, 0)) == RED
        assert upright.getpixel((0, 1)) == BLUE


class TestFolder:
    def test_classes_are_sorted_sub_folders(self, tmp_path: Path) -> None:
        sets.picture_folder(tmp_path, {"zebra": 2, "ant": 3, ".hidden": 1})
        (tmp_path / "ant" / "notes.txt").write_text("no picture")
        (tmp_path / "ant" / "more").mkdir()
        Image.new("L", (9, 9)).save(tmp_path / "ant" / "more" / "x.JPEG")
        source = images.open_source(folder_config(tmp_path))
        assert source.classes == ["ant", "zebra"]
        assert [item.id for item in source] == list(range(6))
        assert [item.label for item in source] == [0, 0, 0, 0, 1, 1]
        assert [item.name for item in source][3:5] == ["ant/more/x.JPEG", "zebra/000.png"]
        assert len(source) == 6
        assert source.credit == ""

    def test_load_gives_the_cropped_picture(self, tmp_path: Path) -> None:
        sets.picture_folder(tmp_path, {"a": 1, "b": 2})
        source = images.open_source(folder_config(tmp_path))
        item = list(source)[2]
        expected = images.center_crop(Image.open(tmp_path / "b" / "001.png"), 8)
        loaded = source.load(item)
        assert loaded.shape == (8, 8, 3)
        assert loaded.dtype == np.uint8
        assert np.array_equal(loaded, expected)

    def test_classes_give_the_labels(self, tmp_path: Path) -> None:
        sets.picture_folder(tmp_path, {"a": 1, "b": 1, "c": 1})
        source = images.open_source(folder_config(tmp_path, classes=["c", "a"]))
        assert source.classes == ["c", "a"]
        assert [(item.name, item.label) for item in source] == [("a/000.png", 1), ("c/000.png", 0)]

    def test_limit_takes_classes_in_turn(self, tmp_path: Path) -> None:
        sets.picture_folder(tmp_path, {"a": 5, "b": 1, "c": 5})
        source = images.open_source(folder_config(tmp_path, limit=6))
        names = ["a/000.png", "a/001.png", "a/002.png", "b/000.png", "c/000.png", "c/001.png"]
        assert [item.name for item in source] == names
        assert [item.id for item in source] == list(range(6))
        # The file behind an id is the one that is named.
        assert np.array_equal(source.load(list(source)[4]), images.center_crop(Image.open(tmp_path / names[4]), 8))

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"images": "/nowhere"}, "'/nowhere'"),
            ({"images": ""}, "data.images"),
            ({"classes": ["dog"]}, "'dog'; allowed are 'a', 'b'"),
            ({"classes": ["a", "a"]}, "'a' named twice"),
            ({"limit": 1}, "no pictures of 'b'"),
            ({"limit": -1}, "data.limit: found -1"),
            ({"resolution_px": 0}, "data.resolution_px: found 0"),
        ],
    )
    def test_wrong_config_is_refused(self, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
        sets.picture_folder(tmp_path, {"a": 1, "b": 1})
        with pytest.raises(DataError, match=message):
            images.open_source(folder_config(tmp_path, **keys))

    def test_zero_classes_and_an_empty_class_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="zero classes"):
            images.open_source(folder_config(tmp_path))
        sets.picture_folder(tmp_path, {"a": 1, "b": 0})
        with pytest.raises(DataError, match="no pictures of 'b'"):
            images.open_source(folder_config(tmp_path))

    @pytest.mark.parametrize("content", [b"", b"no picture", None])
    def test_corrupt_picture_is_named(self, tmp_path: Path, content: bytes | None) -> None:
        sets.picture_folder(tmp_path, {"a": 1})
        path = tmp_path / "a" / "000.png"
        path.write_bytes(path.read_bytes()[:-100] if content is None else content)
        source = images.open_source(folder_config(tmp_path))
        with pytest.raises(images.CorruptImageError, match=r"a/000\.png"):
            source.load(next(iter(source)))

    def test_a_file_that_vanished_is_not_a_corrupt_one(self, tmp_path: Path) -> None:
        sets.picture_folder(tmp_path, {"a": 1})
        source = images.open_source(folder_config(tmp_path))
        (tmp_path / "a" / "000.png").unlink()
        with pytest.raises(DataError, match="cannot be read") as caught:
            source.load(next(iter(source)))
        assert not isinstance(caught.value, images.CorruptImageError)


class TestFashionMnist:
    def write(self, folder: Path) -> np.ndarray[Any, Any]:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (30, 28, 28))
        labels = np.arange(30) % 10
        for part, rows in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
            sets.idx(folder / f"{part}-images-idx3-ubyte.gz", pixels[rows])
            sets.idx(folder / f"{part}-labels-idx1-ubyte.gz", labels[rows])
        return pixels

    def config(self, folder: Path, **keys: Any) -> DataConfig:
        return DataConfig(**({"source": Source.fashion_mnist, "images": str(folder), "resolution_px": 32} | keys))

    def test_train_then_test_with_a_black_border(self, tmp_path: Path) -> None:
        pixels = self.write(tmp_path)
        source = images.open_source(self.config(tmp_path))
        items = list(source)
        assert len(items) == 30
        assert source.classes == list(images.FASHION_MNIST_CLASSES)
        assert (items[23].name, items[23].label) == ("t10k/3", 3)
        loaded = source.load(items[23])
        assert loaded.shape == (32, 32, 3)
        assert np.array_equal(loaded[2:30, 2:30], np.repeat(pixels[23][:, :, None], 3, 2))
        assert not loaded[:2].any()
        assert not loaded[:, 30:].any()

    def test_classes_and_limit_keep_picture_and_label_together(self, tmp_path: Path) -> None:
        pixels = self.write(tmp_path)
        source = images.open_source(self.config(tmp_path, classes=["Bag", "Trouser"], limit=4))
        assert [(item.name, item.label) for item in source] == [
            ("train/1", 1),
            ("train/8", 0),
            ("train/11", 1),
            ("train/18", 0),
        ]
        assert np.array_equal(source.load(list(source)[2])[2:30, 2:30, 0], pixels[11])

    def test_other_sides_are_resized(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        source = images.open_source(self.config(tmp_path, resolution_px=48))
        assert source.load(next(iter(source))).shape == (48, 48, 3)

    def test_missing_files_name_the_package(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="train-images") as caught:
            images.open_source(self.config(tmp_path))
        assert "apt-get install dataset-fashion-mnist" in caught.value.remedy

    def test_malformed_files_are_refused(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        path = tmp_path / "train-labels-idx1-ubyte.gz"
        good = path.read_bytes()
        for content, message in [(good[:-8], "cannot be read"), (b"plain", "cannot be read")]:
            path.write_bytes(content)
            with pytest.raises(DataError, match=message):
                images.open_source(self.config(tmp_path))
        for array, message in [
            (np.zeros((20, 1)), "no IDX file"),
            (np.zeros(19), "belong together"),
            (np.full(20, 10), "belong together"),
        ]:
            sets.idx(path, array)
            with pytest.raises(DataError, match=message):
                images.open_source(self.config(tmp_path))


def test_twemoji_lies_on_white_and_carries_its_credit() -> None:
    source = images.open_source(DataConfig(source=Source.twemoji, resolution_px=32, limit=9))
    assert source.credit == twemoji.CREDIT
    assert source.classes == list(twemoji.CATEGORIES)
    assert [item.label for item in source] == list(range(9))
    grinning = source.load(next(iter(source)))  # The first face: a yellow disc.
    assert (grinning[0, 0] == 255).all()
    assert grinning[10, 16, 0] > 200
    assert grinning[10, 16, 2] < 120
