"""Which checkpoints to delete, decided purely, and the deletion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffussm.checkpoint import restore
from diffussm.checkpoint.manifest import MANIFEST, Manifest
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
    manifest nor a note of quarantine. `attempt` is the one that wrote `saved`.
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


def tidy(store: Store, saved: str, attempt: int, keep: int) -> None:
    """Delete what a checkpoint that is there and verified makes superfluous, and what killed saves left before it.

    Args:
        store: that of its tier.
        saved: its folder; what is newer is left alone.
        attempt: the one that wrote it.
        keep: how many of the newest stay, beside the permanent ones.

    Raises:
        StorageError: something could not be listed or deleted; the next call tries again.
    """
    prefix = saved.rpartition("/")[0]
    folders = {
        folder: manifest.permanent
        for folder, manifest in restore.manifests(store, prefix)
        if isinstance(manifest, Manifest)  # what this version cannot read is not its to delete
    }
    for folder in superfluous(folders, keep, saved):
        delete(store, folder)
    there = [*store.keys(f"{prefix}/"), *store.unfinished(f"{prefix}/")]
    for key in litter(there, saved, attempt):
        store.delete(key)
