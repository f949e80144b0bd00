"""What `diffussm config` prints: all keys with help, or one config with its differences marked."""

from __future__ import annotations

from typing import TextIO

import yaml

from diffussm.config import Config
from diffussm.config.explain import Key, describe, plain_text


def keys(stream: TextIO) -> None:
    """Write every key with type, default and help: a table on a terminal, plain lines elsewhere."""
    if stream.isatty():
        _table(stream)
        return
    for key in describe():
        stream.write(f"{key.name} = {key.default_text}\n    {key.help} Allowed: {key.allowed}.\n")


def marked(cfg: Config) -> str:
    """The resolved config as YAML; a value that differs from its default carries the default in a comment."""
    lines: list[str] = []
    for key in describe(sections=True):
        depth = key.name.count(".")
        indent, last = "  " * depth, key.name.rpartition(".")[2]
        if key.is_section:
            lines.append(f"{indent}{last}:")
            continue
        value = _value(cfg, key)
        text = f"{indent}{last}: {_yaml(value)}"
        lines.append(text if value == key.default else f"{text}  # default: {key.default_text}")
    return "\n".join(lines) + "\n"


def _value(cfg: Config, key: Key) -> object:
    value: object = cfg
    for part in key.name.split("."):
        value = getattr(value, part)
    return value


def _yaml(value: object) -> str:
    """`value` on one line of YAML."""
    plain = plain_text(value) if hasattr(value, "name") else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _table(stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("key", no_wrap=True, style="cyan")
    table.add_column("default", overflow="fold", max_width=24)
    table.add_column("meaning", overflow="fold")
    section = ""
    for key in describe():
        above = key.name.rpartition(".")[0]
        if above != section:
            table.add_section()
            section = above
        choices = f" [{', '.join(key.choices)}]" if key.choices else ""
        table.add_row(key.name, key.default_text, f"{key.help}{choices}")
    Console(file=stream, markup=False).print(table)
