"""The only door to tensorboardX: the same curves, pictures and events as files that TensorBoard reads."""

from __future__ import annotations

import io
import os
import time
from typing import Any

import numpy as np
from PIL import Image

from diffussm.observe.mirror import Mirror
from diffussm.observe.scalars import alert, scalars
from diffussm.observe.sinks import Record

PUSH_S = 60.0
"""Seconds between two uploads of the files of a run in a bucket."""


class TensorBoard:
    """Event files in the run's folder, with images as the step. A resume hides what is replayed."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._writer: Any = None
        self._opened = 0
        self._pushed = time.monotonic()
        self._open(None)

    def take(self, record: Record) -> None:
        """Write one record."""
        if record.get("event") == "resumed":
            self._writer.close()
            self._open(int(record["images"]) + 1)
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, int(record["images"]))
        if record.get("kind") == "picture":
            with Image.open(io.BytesIO(record["png"])) as picture:
                pixels = np.asarray(picture.convert("RGB"))  # (H, W, 3)
            self._writer.add_image(str(record["name"]), pixels, int(record["images"]), dataformats="HWC")
        found = alert(record)
        if found is not None:
            self._writer.add_text(found[0], found[1], int(record.get("images", 0)))
        if time.monotonic() - self._pushed > PUSH_S:
            self._pushed = time.monotonic()  # first: an upload that fails is tried again after that time, not at once
            self._writer.flush()
            self._mirror.try_push()

    def close(self) -> None:
        """Finish the files."""
        self._writer.close()
        self._mirror.try_push()

    def _open(self, purge_step: int | None) -> None:
        from tensorboardX import SummaryWriter

        self._opened += 1
        suffix = f".{os.getpid()}.{self._opened}"  # files of one second would have one name
        self._writer = SummaryWriter(str(self._mirror.folder), purge_step=purge_step, filename_suffix=suffix)
