"""Which checkpoints to delete, decided purely, and the deletion."""

from __future__ import annotations

from collections.abc import Sequence

from diffussm.checkpoint.manifest import MANIFEST
from diffussm.checkpoint.store import Store


def superfluous(folders: Sequence[str], keep: int) -> list[str]:
    """Folders to delete, oldest first, so that the `keep` newest remain. Names sort by age."""
    return sorted(folders)[: max(0, len(folders) - keep)]


def delete(store: Store, folder: str) -> None:
    """Delete one checkpoint, its manifest first: a kill in between leaves files that nobody takes for a checkpoint."""
    keys = list(store.keys(f"{folder}/"))
    for key in sorted(keys, key=lambda k: not k.endswith(f"/{MANIFEST}")):
        store.delete(key)
