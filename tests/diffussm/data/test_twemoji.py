from __future__ import annotations

from collections import Counter

import pytest

from diffussm.data import twemoji
from diffussm.errors import DataError

TONES = {int(tone, 16) for tone in twemoji.TONES if tone}


def test_nine_categories_and_no_flood_of_people() -> None:
    counts = Counter(p.category for p in twemoji.pictures())
    assert set(counts) == set(twemoji.CATEGORIES)
    assert min(counts.values()) > 50
    assert sum(counts.values()) > 1800
    # The package's pictures are people by three fifths.
    assert counts["People & Body"] / sum(counts.values()) < 0.25


def test_one_picture_an_emoji_and_every_tone_about_equally() -> None:
    names = [p.name for p in twemoji.pictures()]
    bare = [tuple(c for c in twemoji.codepoints(name) if c not in TONES) for name in names]
    # Couples' tones can be spelled in two ways; nothing else may come twice.
    assert len(set(names)) == len(names)
    assert len(bare) - len(set(bare)) < 20
    tones = Counter(c for name in names for c in set(twemoji.codepoints(name)) & TONES)
    assert set(tones) == TONES
    assert max(tones.values()) < 1.2 * min(tones.values())


def test_all_files_exist() -> None:
    assert all(p.path.is_file() for p in twemoji.pictures())


def test_variation_selectors_do_not_matter() -> None:
    assert twemoji.codepoints("1F3F3-FE0F-200D-1F308") == twemoji.codepoints("1f3f3-200d-1f308")


def test_a_flag_is_a_flag() -> None:
    germany = next(p for p in twemoji.pictures() if p.name == "1f1e9-1f1ea")
    assert (germany.category, germany.subcategory) == ("Flags", "country-flag")


def test_classes_of_three_levels_in_the_order_asked_for() -> None:
    classes, pictures = twemoji.select(["heart", "face", "Flags"])
    assert classes == ["heart", "face", "Flags"]
    subcategories = {label: {p.subcategory for p, at in pictures if at == label} for label in range(3)}
    assert subcategories[0] == {"heart"}
    assert len(subcategories[1]) > 5
    assert all(sub.startswith("face-") for sub in subcategories[1])
    assert subcategories[2] == {"flag", "country-flag", "subdivision-flag"}


def test_empty_takes_the_categories() -> None:
    classes, pictures = twemoji.select([])
    assert tuple(classes) == twemoji.CATEGORIES
    assert len(pictures) == len(twemoji.pictures())
    assert all(p.category == classes[label] for p, label in pictures)


def test_unknown_class_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(DataError, match=r"'faces'.*country-flag.*face"):
        twemoji.select(["faces"])


@pytest.mark.parametrize("classes", [["Flags", "country-flag"], ["face", "face-smiling"], ["heart", "heart"]])
def test_a_picture_of_two_classes_is_refused(classes: list[str]) -> None:
    with pytest.raises(DataError, match="one class only"):
        twemoji.select(classes)
