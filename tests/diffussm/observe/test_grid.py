from __future__ import annotations

import io

import numpy as np
from PIL import Image

from diffussm.observe.grid import grid


def test_each_picture_stands_in_its_row_and_column() -> None:
    pictures = np.zeros((6, 8, 8, 3), np.uint8)
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]
    for picture, colour in zip(pictures, colours, strict=True):
        picture[:] = colour
    image = Image.open(io.BytesIO(grid(pictures, ["flags", "faces"], scale=2)))
    seen = np.asarray(image.convert("RGB"))
    centres = []
    for colour in colours:
        rows, columns = np.nonzero((seen == colour).all(-1))
        assert len(rows) == 16 * 16  # each picture is shown whole, enlarged without smoothing
        centres.append((rows.mean(), columns.mean()))
    assert centres[0][0] == centres[1][0] == centres[2][0] < centres[3][0]
    assert centres[0][1] < centres[1][1] < centres[2][1]
    assert centres[0][1] == centres[3][1]


def test_the_credit_is_below_and_wraps() -> None:
    pictures = np.zeros((1, 32, 32, 3), np.uint8)
    plain = Image.open(io.BytesIO(grid(pictures, ["a"])))
    credited = Image.open(io.BytesIO(grid(pictures, ["a"], credit="graphics by many people of a long name")))
    assert credited.width == plain.width
    assert credited.height > plain.height + 20
    assert (np.asarray(credited.convert("L"))[plain.height :] < 200).any()
