"""A labels file: which class each picture of a folder has, in the forms people have them in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

from diffussm.data.source import read_bytes
from diffussm.errors import DataError

NAME_KEYS = ("file_name", "file", "filename", "path", "name", "image")
"""Columns that may hold a picture's name; the first is Hugging Face's."""
LABEL_KEYS = ("label", "class", "cls", "labels", "category")
"""Columns that may hold its class, unless `data.label_column` names one."""
FORMS = (".csv", ".tsv", ".jsonl", ".json", ".txt")


def read_labels(file: str, column: str = "") -> dict[str, str | int]:
    """Class (a name or a number) by picture name, from a local file or an object.

    Forms: `.csv` and `.tsv` with a header, `.jsonl` with an object a line (both as Hugging Face's metadata files),
    `.json` with {name: class} or {"labels": [[name, class], ...]}, `.txt` with `name class` a line.

    Args:
        file: path or URL.
        column: name of the class column; empty looks for one of LABEL_KEYS.

    Raises:
        DataError: another form, a malformed line, a picture named twice, or nothing in it.
        StorageError: it cannot be read.
    """
    form = next((form for form in FORMS if file.lower().endswith(form)), None)
    if form is None:
        raise DataError(f"data.labels: found {file}; allowed are {', '.join(FORMS)}", "write the labels in such a file")
    try:
        text = read_bytes(file).decode("utf-8-sig")
        pairs = list(_pairs(text, form, column))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"data.labels: {file} is malformed ({error})", "mend the file") from error
    labels: dict[str, str | int] = {}
    for name, label in pairs:
        name = name.removeprefix("./")
        if labels.setdefault(name, label) != label:
            raise DataError(f"data.labels: {file} gives {name} two classes, {labels[name]!r} and {label!r}")
    if not labels:
        raise DataError(f"data.labels: {file} holds no labels", "name another file")
    return labels


def _pairs(text: str, form: str, column: str) -> Iterable[tuple[str, str | int]]:
    if form in (".csv", ".tsv"):
        rows: Iterable[Mapping[str, Any]] = csv.DictReader(io.StringIO(text), delimiter="\t" if form == ".tsv" else ",")
        return [_of_row(row, column) for row in rows]
    if form == ".jsonl":
        return [_of_row(json.loads(line), column) for line in text.splitlines() if line.strip()]
    if form == ".json":
        content = json.loads(text)
        listed = content["labels"] if isinstance(content, dict) and isinstance(content.get("labels"), list) else None
        return [(str(name), as_label(label)) for name, label in (content.items() if listed is None else listed)]
    split = [line.rsplit(None, 1) for line in text.splitlines() if line.strip()]
    short = [parts for parts in split if len(parts) != 2]
    if short:
        raise ValueError(f"line {short[0]!r} is not `name class`")
    return [(name, as_label(label)) for name, label in split]


def _of_row(row: Mapping[str, Any], column: str) -> tuple[str, str | int]:
    name = next((row[key] for key in NAME_KEYS if row.get(key)), None)
    label = pick(row, column)
    if name is None or label is None:
        raise ValueError(
            f"a line has {', '.join(map(repr, row))}; needed are one of {', '.join(NAME_KEYS)} and "
            f"{column or 'one of ' + ', '.join(LABEL_KEYS)}"
        )
    return str(name), label


def pick(row: Mapping[str, Any], column: str) -> str | int | None:
    """The class in a mapping of columns, by the column's name or one of LABEL_KEYS; None if it has none."""
    found = next((row[key] for key in ([column] if column else LABEL_KEYS) if row.get(key) is not None), None)
    return None if found is None else as_label(found)


def as_label(value: Any) -> str | int:
    """A class as the number or the name that it is; raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"found {value!r} as a class; allowed are a number or a name")
    text = str(value).strip()
    return int(text) if text.isascii() and text.isdecimal() else text
