"""A score over the images of training, as PNG: the line, its intervals, and what real pictures score."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH_PX, HEIGHT_PX, LEFT_PX, MARGIN_PX = 720, 400, 70, 36
_LINE, _BAND, _FLOOR, _GREY = (31, 90, 180), (150, 185, 230), (200, 80, 40), (140, 140, 140)
_PREFIX = "score/"


def first_score(records: Sequence[Mapping[str, Any]]) -> str:
    """Name of the first score of the newest evaluation; empty if there is none."""
    for record in reversed(records):
        for key in record:
            if key.startswith(_PREFIX) and key.count("/") == 1:
                return key.removeprefix(_PREFIX)
    return ""


def points(records: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, float | None]]:
    """images, value, low, high and floor of one score, by images; of several evaluations of one place the last."""
    by_images = {}
    for record in records:
        if f"{_PREFIX}{name}" in record:
            more = {part: record.get(f"{_PREFIX}{name}/{part}") for part in ("low", "high", "floor")}
            by_images[record["images"]] = {"images": record["images"], "value": record[f"{_PREFIX}{name}"]} | more
    return [by_images[images] for images in sorted(by_images)]


def curve(records: Sequence[Mapping[str, Any]], name: str = "") -> bytes:
    """Draw one score over images.

    Args:
        records: lines of evaluations.jsonl: `images` and `score/<name>`, with `/low`, `/high` and `/floor` if known.
        name: which score; empty takes the first one of the newest evaluation.

    Returns: a PNG file's bytes; a chart without a line if there is no such score.
    """
    name = name or first_score(records)
    found = points(records, name)
    canvas = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    values = [float(v) for p in found for key in ("value", "low", "high", "floor") if (v := p[key]) is not None]
    top = _rounded(max([*values, 0.0])) or 1.0
    right = max([float(p["images"] or 0) for p in found], default=0.0) or 1.0

    def at(images: float, value: float) -> tuple[float, float]:
        x = LEFT_PX + (WIDTH_PX - LEFT_PX - MARGIN_PX) * images / right
        return x, HEIGHT_PX - MARGIN_PX - (HEIGHT_PX - 2 * MARGIN_PX) * max(value, 0.0) / top

    for tick in range(5):
        value = top * tick / 4
        (x0, y), (x1, _) = at(0, value), at(right, value)
        draw.line((x0, y, x1, y), fill=(225, 225, 225))
        draw.text((x0 - 8, y), f"{value:,.4g}", fill=_GREY, font=font, anchor="rm")
        x, y = at(right * tick / 4, 0)
        draw.text((x, y + 8), _short(right * tick / 4), fill=_GREY, font=font, anchor="mt")
    for p in found:
        if p["low"] is not None and p["high"] is not None:
            (x, y0), (_, y1) = at(p["images"] or 0, p["low"]), at(p["images"] or 0, p["high"])
            draw.rectangle((x - 4, y1, x + 4, y0), fill=_BAND)
    floors = [(p["images"] or 0, p["floor"]) for p in found if p["floor"] is not None]
    if floors:
        (x0, y), (x1, _) = at(0, floors[-1][1]), at(right, floors[-1][1])
        draw.line((x0, y, x1, y), fill=_FLOOR, width=2)
        draw.text((x1, y - 4), f"real against real {floors[-1][1]:,.4g}", fill=_FLOOR, font=font, anchor="rb")
    line = [at(p["images"] or 0, p["value"] or 0) for p in found]
    if len(line) > 1:
        draw.line(line, fill=_LINE, width=2)
    for x, y in line:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_LINE)
    draw.text((LEFT_PX, 10), f"{name or 'no score yet'} over images of training", fill="black", font=font)
    stream = io.BytesIO()
    canvas.save(stream, format="PNG")
    return stream.getvalue()


def _rounded(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten, so that the ticks are short numbers."""
    power = 10.0 ** (len(f"{int(value)}") - 1) if value >= 1 else 0.1
    while power * 1.0 > value > 0:
        power /= 10
    return next((power * step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if power * step >= value), value)


def _short(images: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if images >= size:
            return f"{images / size:.4g}{letter}"
    return f"{images:.4g}"
