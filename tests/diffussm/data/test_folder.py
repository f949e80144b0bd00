"""Folders beyond one sub-folder a class, which test_images.py walks through: flat ones, links, labels files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from diffussm.config.schema import DataConfig, Source
from diffussm.data import images
from tests.diffussm.data import sets


def config(path: Path, **keys: Any) -> DataConfig:
    return DataConfig(source=Source.folder, images=str(path), resolution_px=8, **keys)


def labelled(path: Path, **keys: Any) -> dict[str, str]:
    source = images.open_source(config(path, **keys))
    return {item.name: source.classes[item.label] for item in source}


def test_a_flat_folder_is_one_class(tmp_path: Path) -> None:
    sets.picture_folder(tmp_path, {"church": 3})
    assert labelled(tmp_path / "church") == {f"{i:03}.png": "church" for i in range(3)}


def test_loose_pictures_beside_class_folders_are_left_out_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sets.picture_folder(tmp_path, {"a": 2})
    (tmp_path / "a" / "000.png").rename(tmp_path / "loose.png")
    assert labelled(tmp_path) == {"a/001.png": "a"}
    assert "1 pictures" in caplog.text


def test_class_folders_may_be_links(tmp_path: Path) -> None:
    sets.picture_folder(tmp_path / "there", {"n01": 2})
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "n01").symlink_to(tmp_path / "there" / "n01")
    assert list(labelled(tmp_path / "here")) == ["n01/000.png", "n01/001.png"]


FORMS = {
    "m.csv": "file_name,label\na/000.png,1\nb/000.png,0\n",
    "m.tsv": "path\tclass\na/000.png\t1\n./b/000.png\t0\n",
    "m.jsonl": '{"file_name": "a/000.png", "label": 1}\n\n{"file_name": "b/000.png", "label": 0}\n',
    "m.json": '{"a/000.png": 1, "b/000.png": 0}',
    "d.json": '{"labels": [["a/000.png", 1], ["b/000.png", 0]]}',
    "m.txt": "a/000.png 1\nb/000.png 0\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_labels_file_says_the_class(tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    sets.picture_folder(tmp_path / "p", {"a": 2, "b": 1})
    (tmp_path / form).write_text(FORMS[form])
    with caplog.at_level(logging.WARNING):
        assert labelled(tmp_path / "p", labels=str(tmp_path / form)) == {"a/000.png": "1", "b/000.png": "0"}
    assert "1 pictures without a label" in caplog.text


def test_numbers_are_sorted_by_value_and_names_by_name(tmp_path: Path) -> None:
    sets.picture_folder(tmp_path / "p", {"a": 3})
    file = tmp_path / "l.txt"
    file.write_text("a/000.png 10\na/001.png 9\na/002.png 100\n")
    assert images.open_source(config(tmp_path / "p", labels=str(file))).classes == ["9", "10", "100"]
    file.write_text("a/000.png ten\na/001.png nine\na/002.png ten\n")
    source = images.open_source(config(tmp_path / "p", labels=str(file), classes=["ten"]))
    assert [item.name for item in source] == ["a/000.png", "a/002.png"]
