"""The plan of making latents: units of work that any worker can do alone, in a fixed order. Pure.

What a unit's shards hold follows from the plan alone, so they are the same bytes whoever makes them and how often.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffussm.data.source import ImageSource, Item

_BATCH = 64
_BATCH_SIDE_PX = 256
"""Up to this side the encoder takes _BATCH pictures at once; above, as many as have the same area."""


@dataclass(frozen=True)
class Unit:
    """Pictures that are encoded together into shards of their own."""

    number: int
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Plan:
    """All units, and the settings that decide their bytes."""

    settings: dict[str, Any]
    units: tuple[Unit, ...]
    digest: str
    """SHA-256 over the settings and each picture's name, label and place, in order."""

    @property
    def images(self) -> int:
        """Pictures in all units."""
        return sum(len(unit.items) for unit in self.units)


def plan(source: ImageSource, settings: dict[str, Any], unit_images: int) -> Plan:
    """Cut the pictures of `source`, in their storage order, into units of `unit_images`; the last may be smaller."""
    items = [source.items[i] for i in storage_order(source.items, source.groups_matter, unit_images)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for item in items:
        # Not the file's place: the same pictures may be mounted elsewhere when the work goes on.
        digest.update(f"{item.name}\0{item.label}\0{item.where.first}\0{item.where.second}\n".encode())
    units = tuple(
        Unit(number, tuple(items[start : start + unit_images]))
        for number, start in enumerate(range(0, len(items), unit_images))
    )
    return Plan(settings, units, digest.hexdigest())


def storage_order(items: Sequence[Item], groups_matter: bool, unit_images: int) -> list[int]:
    """Positions of `items` in the order in which they are stored: random and fixed, so that shards hold all classes.

    Where pictures are cheap to read only together (row groups of Parquet), whole groups are put in random order and
    pictures are mixed within a unit.
    """
    if not groups_matter:
        return np.random.default_rng(0).permutation(len(items)).tolist()
    groups: dict[tuple[str, int], list[int]] = {}
    for position, item in enumerate(items):
        groups.setdefault((item.where.file, item.where.first), []).append(position)
    members = list(groups.values())
    order = [position for i in np.random.default_rng(0).permutation(len(members)) for position in members[i]]
    mixed: list[int] = []
    for start in range(0, len(order), unit_images):
        part = order[start : start + unit_images]
        mixed += [part[i] for i in np.random.default_rng([0, start]).permutation(len(part))]
    return mixed


def batch_size(asked: int, resolution_px: int, images: int) -> int:
    """Pictures in each pass of the encoder: `asked`, or by the resolution for 0; never more than there are."""
    area = (_BATCH_SIDE_PX / resolution_px) ** 2
    return min(asked or max(1, int(_BATCH * min(1.0, area))), images)
