"""A rank's local folder, which outlives no rank: a killed one's is removed by the next rank that starts on the node."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "diffussm-rank-"
_LOCK = "lock"


@contextmanager
def scratch(root: Path | None = None) -> Iterator[Path]:
    """A new folder below `root` (the machine's temporary folder by default) for as long as the block runs.

    The folder is locked by this process, in whatever container it is; those nobody locks are left from ranks that were
    killed, with a whole cache of shards perhaps, and go now.
    """
    root = root or Path(tempfile.gettempdir())
    # Invisible to others until it is locked: the lock is the file's, so a new name does not change it.
    hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=root))
    with (hidden / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = hidden.rename(root / f"{PREFIX}{hidden.name.removeprefix(f'.{PREFIX}')}")
        sweep(root)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # a reader's thread may still write; the next rank sweeps


def sweep(root: Path) -> list[Path]:
    """Remove the folders of ours that no process holds; returns them."""
    gone = []
    for folder in root.glob(f"{PREFIX}*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            with (folder / _LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                gone.append(folder)
        except OSError:  # it is held, or it went meanwhile
            continue
    return gone
