from __future__ import annotations

from pathlib import Path

import pytest

from diffussm.data.labels import read_labels
from diffussm.errors import DataError


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.xls", "", r"allowed are \.csv"),
        ("l.csv", "file_name,width\na,3\n", "a line has 'file_name', 'width'"),
        ("l.jsonl", "{", "is malformed"),
        ("l.json", '{"a": 1.5}', "found 1.5 as a class"),
        ("l.json", '{"a": [1]}', "found .1. as a class"),
        ("l.json", '["a", 1]', "is malformed"),
        ("l.json", '{"labels": ["a", 1]}', "is malformed"),
        ("l.jsonl", '["a", 1]', "is malformed"),
        ("l.txt", "lonely\n", "is not `name class`"),
        ("l.txt", "", "holds no labels"),
        ("l.txt", "a 1\na 2\n", "gives a two classes, 1 and 2"),
        ("l.txt", "\ufffe\udcff", None),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, text: str, message: str | None) -> None:
    file = tmp_path / name
    file.write_bytes(b"a \xff\xff\n" if message is None else text.encode())
    with pytest.raises(DataError, match=message or "is malformed"):
        read_labels(str(file))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: cannot be read"):
        read_labels(str(tmp_path / "none.csv"))


def test_a_column_can_be_named(tmp_path: Path) -> None:
    file = tmp_path / "l.csv"
    file.write_text("name,label,kind\nx y.png,1,tree\n")
    assert read_labels(str(file)) == {"x y.png": 1}
    assert read_labels(str(file), "kind") == {"x y.png": "tree"}
