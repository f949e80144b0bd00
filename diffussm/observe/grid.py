"""A grid of pictures as PNG: one row a class, its name before the row, the credit below."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

GAP_PX = 2
MARGIN_PX = 6


def grid(pictures: npt.NDArray[np.uint8], rows: Sequence[str], credit: str = "", scale: int = 1) -> bytes:
    """Draw pictures row by row.

    Args:
        pictures: (R * K, H, W, 3) uint8, the K pictures of the first row first.
        rows: the R names.
        credit: line below, for data whose licence asks for it.
        scale: whole number by which each picture is enlarged without smoothing.

    Returns: a PNG file's bytes.
    """
    count, height, width, _ = pictures.shape
    columns = count // len(rows)
    cell_h, cell_w = height * scale + GAP_PX, width * scale + GAP_PX
    text_px = max(11, min(16, cell_h // 3))
    font = ImageFont.load_default(size=text_px)
    label_w = MARGIN_PX * 2 + int(max((font.getlength(name) for name in rows), default=0))
    total_w = label_w + columns * cell_w + MARGIN_PX
    credit_lines = _wrap(credit, font, total_w - 2 * MARGIN_PX)
    line_h = text_px + 4
    canvas_h = MARGIN_PX * 2 + len(rows) * cell_h + len(credit_lines) * line_h
    canvas = Image.new("RGB", (total_w, canvas_h), "white")
    draw = ImageDraw.Draw(canvas)
    for r, name in enumerate(rows):
        top = MARGIN_PX + r * cell_h
        draw.text((MARGIN_PX, top + cell_h // 2), name, fill="black", font=font, anchor="lm")
        for c in range(columns):
            picture = Image.fromarray(pictures[r * columns + c])
            picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            canvas.paste(picture, (label_w + c * cell_w, top))
    for i, line in enumerate(credit_lines):
        top = MARGIN_PX + len(rows) * cell_h + i * line_h
        draw.text((MARGIN_PX, top), line, fill=(90, 90, 90), font=font)
    stream = io.BytesIO()
    canvas.save(stream, format="PNG")
    return stream.getvalue()


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    """Words of `text` in lines that fit."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width_px:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
