"""Configuration of a run: schema, loading, rules across sections, and the words that explain each key."""

from __future__ import annotations

from diffussm.config.load import digest, dump, load, preset
from diffussm.config.plan import world_sizes
from diffussm.config.rules import check
from diffussm.config.schema import Config

__all__ = ["Config", "check", "digest", "dump", "load", "preset", "world_sizes"]
