"""The keys of a config with type, default and help, read from the schema's own source.

The help of a key is the literal string under its field, which Python drops at run time; so the schema's source is
parsed. One place thus serves the reader of the source, `diffussm config` and every error message.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import typing
from dataclasses import dataclass
from enum import Enum
from typing import Any

from diffussm.config import schema, schema_data, schema_jobs

PRIVATE_SECTIONS = ("slurm", "kubernetes", "plan")
"""Sections of the config that say where a run goes on, not what it is: environments and names of secrets among them."""


@dataclass(frozen=True)
class Key:
    """One key of a config."""

    name: str
    """Dotted name, as in an override."""
    kind: type
    """Type of the value; `dict` for a section, `list` for a list."""
    optional: bool
    """Whether null is a value."""
    default: Any
    """Default value; `omegaconf.MISSING` ("???") when the key must be set, None for a section."""
    help: str
    """One line: meaning, unit and special values."""
    item: type = str
    """Type of a list's items."""

    @property
    def is_section(self) -> bool:
        """Whether the key holds other keys."""
        return self.kind is dict

    @property
    def choices(self) -> list[str]:
        """The values of an enumeration; empty for other types."""
        return [member.name for member in self.kind] if issubclass(self.kind, Enum) else []

    @property
    def allowed(self) -> str:
        """What the value may be, in words."""
        items = "a list of numbers" if self.item is float else "a list of text"
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: items}
        text = ", ".join(self.choices) or words.get(self.kind, "keys of the section")
        return f"{text}, or null" if self.optional else text

    @property
    def default_text(self) -> str:
        """The default as it would be written in a file."""
        return plain_text(self.default)


def plain_text(value: Any) -> str:
    """`value` as it would be written in a config file; "(must be set)" for a mandatory key without a value."""
    if isinstance(value, Enum):
        return value.name
    if value == schema.MISSING:
        return "(must be set)"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return '""' if value == "" else str(value)


@functools.cache
def describe(sections: bool = False) -> tuple[Key, ...]:
    """All keys in the order of the schema; with `sections` also the sections' own names before their keys."""
    help_of = _help_strings()
    return tuple(key for key in _walk(schema.Config, "", help_of) if sections or not key.is_section)


@functools.cache
def table() -> dict[str, Key]:
    """Keys and sections by dotted name."""
    return {key.name: key for key in describe(sections=True)}


def nearest(name: str) -> str:
    """The known key most like the unknown dotted `name`, or "" when none is alike.

    A slip within the right section counts most; then a right last part in a wrong section counts more than a similar
    spelling of the whole: `lr` means `train.lr`.
    """
    names = [key.name for key in describe(sections=True)]
    section, _, last = name.rpartition(".")
    beside = [known for known in names if section and known.rpartition(".")[0] == section]
    slip = difflib.get_close_matches(name, beside, n=1, cutoff=0.85)
    if slip:
        return slip[0]
    same_last = [known for known in names if known.rpartition(".")[2] == last]
    whole = difflib.get_close_matches(name, same_last or names, n=1, cutoff=0.6)
    if whole:
        return whole[0]
    close = difflib.get_close_matches(last, {known.rpartition(".")[2]: known for known in names}, n=1, cutoff=0.75)
    return next((known for known in names if close and known.rpartition(".")[2] == close[0]), "")


def _help_strings() -> dict[tuple[str, str], str]:
    """Help by (class name, field name): the string expression that follows the field in the source."""
    found: dict[tuple[str, str], str] = {}
    body = [node for module in (schema, schema_data, schema_jobs) for node in ast.parse(inspect.getsource(module)).body]
    for node in body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, node.body[1:], strict=False):
            is_field = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if is_field and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[node.name, field.target.id] = str(after.value.value).strip()  # type: ignore[attr-defined]
    return found


def _walk(cls: type, prefix: str, help_of: dict[tuple[str, str], str]) -> list[Key]:
    """Keys of the dataclass `cls`, sections first, depth first."""
    keys: list[Key] = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, hints[field.name]
        words = help_of.get((cls.__name__, field.name), "")
        if dataclasses.is_dataclass(hint):
            keys.append(Key(name, dict, False, None, words))
            keys += _walk(typing.cast(type, hint), name + ".", help_of)
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        optional = type(None) in typing.get_args(hint)
        kind = options[0] if optional else (typing.get_origin(hint) or hint)
        keys.append(Key(name, kind, optional, default, words, options[0] if kind is list else str))
    return keys
