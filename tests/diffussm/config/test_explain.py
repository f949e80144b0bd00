"""What `diffussm config` says about the keys."""

from __future__ import annotations

import dataclasses
from enum import Enum

import pytest

from diffussm.config import explain, schema


def leaves(cfg: object, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for field in dataclasses.fields(cfg):  # type: ignore[arg-type]
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = value
    return found


def test_keys_and_defaults_are_those_of_the_schema() -> None:
    assert {key.name: key.default for key in explain.describe()} == leaves(schema.Config())


def test_every_key_has_one_line_of_help() -> None:
    for key in explain.describe(sections=True):
        assert key.help, key.name
        assert "\n" not in key.help, key.name
        assert key.help.endswith("."), key.name


def test_help_is_the_string_under_the_field_itself() -> None:
    table = explain.table()
    assert table["train.images"].help == "Length of the training in images seen."
    assert table["data.images"].help.startswith("Folder or s3:// URL of the images")
    assert table["train"].help == "Optimisation."


def test_kinds_and_choices() -> None:
    table = explain.table()
    assert table["train.precision"].choices == ["fp32", "bf16"]
    assert table["data.source"].allowed == "twemoji, fashion_mnist, folder, tar, parquet"
    assert table["model.width"].kind is int
    assert table["model.width"].optional
    assert table["model.width"].allowed == "a whole number, or null"
    assert table["data.classes"].kind is list
    assert table["train.power_ema"].allowed == "a list of numbers"
    assert table["train"].is_section
    assert not table["train.lr"].is_section


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (None, "null"), ("", '""'), ("???", "(must be set)"), (["a", "b"], "[a, b]"), (0.1, "0.1")],
)
def test_values_are_written_as_in_a_file(value: object, text: str) -> None:
    assert explain.plain_text(value) == text
    assert explain.plain_text(schema.Precision.bf16) == "bf16"


@pytest.mark.parametrize(
    ("unknown", "known"),
    [
        ("train.imags", "train.images"),
        ("lr", "train.lr"),
        ("model.lr", "train.lr"),
        ("evaluate.image", "evaluate.images"),
        ("seeed", "seed"),
        ("qqqq", ""),
    ],
)
def test_nearest(unknown: str, known: str) -> None:
    assert explain.nearest(unknown) == known


def test_enumerations_are_written_by_the_name_a_file_uses() -> None:
    assert all(isinstance(key.default, Enum) == bool(key.choices) for key in explain.describe())
