"""Which checkpoints to delete, decided purely, and the deletion."""

from __future__ import annotations

from collections.abc import Sequence

from diffussm.checkpoint.manifest import MANIFEST
from diffussm.checkpoint.store import Store


def superfluous(folders: Sequence[str], keep: int, saved: str) -> list[str]:
    """Folders to delete, oldest first, so that `saved` and the `keep` - 1 before it remain. Names sort by age.

    A folder that is newer than the one just saved did not verify when the run was resumed: it neither counts nor goes,
    until the run reaches its place again and writes it anew.
    """
    mine = sorted(folder for folder in folders if folder <= saved)
    return mine[: max(0, len(mine) - keep)]


def delete(store: Store, folder: str) -> None:
    """Delete one checkpoint, its manifest first: a kill in between leaves files that nobody takes for a checkpoint."""
    keys = list(store.keys(f"{folder}/"))
    for key in sorted(keys, key=lambda k: not k.endswith(f"/{MANIFEST}")):
        store.delete(key)
