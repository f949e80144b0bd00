from __future__ import annotations

import io

import numpy as np
from PIL import Image

from diffussm.observe.curve import curve, first_score, points

RECORDS = [
    {"images": 200, "score/FD-X": 40.0, "score/FD-X/low": 35.0, "score/FD-X/high": 45.0, "score/FD-X/floor": 10.0},
    {"event": "evaluation failed", "images": 300},
    {"images": 100, "score/FD-X": 90.0, "score/KD-X": 0.3},
    {"images": 200, "score/FD-X": 30.0, "score/FD-X/floor": 10.0},
]


def test_points_are_in_order_of_images_and_the_last_of_a_place_counts() -> None:
    assert first_score(RECORDS) == "FD-X"
    assert points(RECORDS, "FD-X") == [
        {"images": 100, "value": 90.0, "low": None, "high": None, "floor": None},
        {"images": 200, "value": 30.0, "low": None, "high": None, "floor": 10.0},
    ]
    assert [p["value"] for p in points(RECORDS, "KD-X")] == [0.3]


def coloured(png: bytes, colour: tuple[int, int, int]) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    return np.argwhere((pixels == colour).all(axis=2))


def test_the_line_falls_where_the_score_falls_and_the_floor_lies_below() -> None:
    png = curve(RECORDS)
    line, floor = coloured(png, (31, 90, 180)), coloured(png, (200, 80, 40))
    first, last = line[line[:, 1].argmin()], line[line[:, 1].argmax()]
    assert last[0] > first[0] + 100  # rows count downwards
    assert np.median(floor[:, 0]) > last[0]
    assert len(coloured(curve(RECORDS[:1]), (150, 185, 230))) > 50  # an interval is drawn


def test_without_a_score_there_is_an_empty_chart() -> None:
    assert len(coloured(curve([]), (31, 90, 180))) == 0
