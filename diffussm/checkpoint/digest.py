"""Digests of files: XXH3-128, fast enough to check every byte that is read back."""

from __future__ import annotations

from pathlib import Path

import xxhash


def digest_file(path: Path) -> str:
    """XXH3-128 of the file's bytes, in hexadecimal."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()
