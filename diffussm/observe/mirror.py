"""A local folder that other libraries append to, kept also in the run's bucket."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from diffussm.checkpoint.store import LocalStore, Store
from diffussm.errors import StorageError

_LOG = logging.getLogger(__name__)


class Mirror:
    """A folder of a run. Where the run is a folder itself there is nothing to do.

    Attributes:
        folder: where to write.
    """

    def __init__(self, store: Store, prefix: str, scratch: Path) -> None:
        """`prefix` is the place within the run; `scratch` takes the files of a run in a bucket."""
        self._store = None if isinstance(store, LocalStore) else store
        self.folder = store.root / prefix if isinstance(store, LocalStore) else scratch / prefix
        self._prefix = prefix
        self._sizes: dict[Path, int] = {}
        self._lock = threading.Lock()

    def try_push(self) -> None:
        """As `push`; what fails is told as a warning, and is uploaded with the next one."""
        try:
            self.push()
        except (StorageError, OSError) as error:  # OSError: a file that went away meanwhile
            _LOG.warning("%s: its files were not kept: %s", self._prefix, error)

    def push(self) -> None:
        """Upload files that have grown since the last time; links are left out. Raises StorageError."""
        if self._store is None:
            return
        with self._lock:
            for path in sorted(self.folder.rglob("*")):
                if path.is_symlink() or not path.is_file():
                    continue
                data = path.read_bytes()
                if self._sizes.get(path) != len(data):
                    self._store.write(f"{self._prefix}/{path.relative_to(self.folder).as_posix()}", data)
                    self._sizes[path] = len(data)
