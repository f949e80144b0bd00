"""Which checkpoints to delete, decided purely, and the deletion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffussm.checkpoint.manifest import MANIFEST
from diffussm.checkpoint.quarantine import NOTE
from diffussm.checkpoint.store import Store


def superfluous(folders: Mapping[str, bool] | Sequence[str], keep: int, saved: str) -> list[str]:
    """Folders to delete, oldest first, so that `saved`, the `keep` - 1 before it and all milestones remain.

    Args:
        folders: folder -> whether it is kept for ever (a sequence has none of those). Names sort by age.
        keep: how many of the newest stay.
        saved: the one just written and verified.

    A folder that is newer than the one just saved was not used when the run was resumed: it neither counts nor goes,
    until the run reaches its place again and writes it anew.
    """
    permanent = folders if isinstance(folders, Mapping) else dict.fromkeys(folders, False)
    mine = sorted(folder for folder in permanent if folder <= saved)
    return [folder for folder in mine[: max(0, len(mine) - keep)] if not permanent[folder]]


def litter(keys: Sequence[str], saved: str, attempt: int) -> list[str]:
    """Files that killed or replaced saves left behind, among all `keys` of the checkpoints.

    These are the files of older attempts in the folder just saved, and those in older folders that have neither a
    manifest nor a note of quarantine.
    """
    known = {key.rsplit("/", 1)[0] for key in keys if key.endswith((f"/{MANIFEST}", f"/{NOTE}"))}
    left = []
    for key in keys:
        folder, name = key.rsplit("/", 1)
        foreign = name != MANIFEST and not name.startswith(f"attempt{attempt:04d}-")
        if (folder == saved and foreign) or (folder < saved and folder not in known):
            left.append(key)
    return left


def delete(store: Store, folder: str) -> None:
    """Delete one checkpoint, its manifest first: a kill in between leaves files that nobody takes for a checkpoint."""
    keys = list(store.keys(f"{folder}/"))
    for key in sorted(keys, key=lambda k: not k.endswith(f"/{MANIFEST}")):
        store.delete(key)
