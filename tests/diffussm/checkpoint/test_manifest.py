"""The manifest as data, and the index that makes world sizes free."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffussm.checkpoint.manifest import VERSION, Counters, File, Index, Manifest, NewerFormat, Piece
from diffussm.errors import DataError

ZERO = Counters(0, 0, 0, 0, 0, 0)


def manifest() -> Manifest:
    file = File("r0.safetensors", 123, "abc", (Piece("w", 0, 6),))
    return Manifest(ZERO, 1, 1, 3, "d", ("master", "ema"), {"w": (2, 3)}, (file,), {"torch": "2"})


def test_json_round_trip() -> None:
    assert Manifest.from_json(manifest().to_json(), "here") == manifest()


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.pop("files"),
        lambda raw: raw.update(format="something-else"),
        lambda raw: raw["counters"].pop("images"),
        lambda raw: raw["files"][0].pop("xxh3"),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(damage) -> None:
    raw = json.loads(manifest().to_json())
    damage(raw)
    with pytest.raises(DataError, match="there"):
        Manifest.from_json(json.dumps(raw).encode(), "there")


def test_a_manifest_of_the_future_is_told_from_a_damaged_one() -> None:
    raw = json.loads(manifest().to_json()) | {"version": VERSION + 1, "files": "something new"}
    with pytest.raises(NewerFormat, match=f"version {VERSION + 1} of the format") as refusal:
        Manifest.from_json(json.dumps(raw).encode(), "there")
    assert "install" in refusal.value.remedy


def test_text_that_is_not_json_is_refused() -> None:
    with pytest.raises(DataError, match="not a checkpoint manifest"):
        Manifest.from_json(b"\x00{", "there")


def cut(total: int, cuts: list[int]) -> list[tuple[int, int]]:
    edges = sorted({0, total, *(c % (total + 1) for c in cuts)})
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


@given(st.integers(1, 60), st.lists(st.integers(0, 60), max_size=6), st.lists(st.integers(0, 60), max_size=6))
def test_any_cut_reassembles_from_any_other(total: int, saved: list[int], wanted: list[int]) -> None:
    content = list(range(total))
    files = [File(f"f{i}", 0, "", (Piece("w", start, numel),)) for i, (start, numel) in enumerate(cut(total, saved))]
    held = {f.name: content[f.pieces[0].start : f.pieces[0].start + f.pieces[0].numel] for f in files}
    index = Index(reversed(files))
    for start, numel in cut(total, wanted):
        got = [-1] * numel
        for copy in index.copies("w", start, numel):
            got[copy.target : copy.target + copy.numel] = held[copy.file][copy.source : copy.source + copy.numel]
        assert got == content[start : start + numel]


def test_a_gap_and_an_unknown_parameter_are_refused() -> None:
    index = Index([File("a", 0, "", (Piece("w", 0, 3),)), File("b", 0, "", (Piece("w", 4, 3),))])
    assert [c.file for c in index.copies("w", 1, 2)] == ["a"]
    with pytest.raises(DataError, match=r"3\.\.7 of w"):
        index.copies("w", 1, 6)
    with pytest.raises(DataError, match="of v"):
        index.copies("v", 0, 1)


def test_elements_in_two_files_are_refused() -> None:
    index = Index([File("a", 0, "", (Piece("w", 0, 4),)), File("b", 0, "", (Piece("w", 3, 3),))])
    with pytest.raises(DataError, match="of w"):
        index.copies("w", 0, 6)


def test_counters_follow_the_epoch_and_leave_skipped_steps_out() -> None:
    at = ZERO.after_step(8, 0, skipped=False).after_step(8, 0, skipped=True).after_step(8, 1, skipped=False)
    assert at == Counters(images=24, step=3, epoch=1, images_in_epoch=8, adam_steps=2, nonfinite_steps=1)
