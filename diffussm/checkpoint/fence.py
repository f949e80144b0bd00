"""The right to write a run's state: the newest attempt has it, and one that is not the newest stops itself."""

from __future__ import annotations

import logging
import threading

from diffussm.checkpoint.store import Store
from diffussm.errors import StorageError, Superseded

_LOG = logging.getLogger(__name__)


def record(attempt: int) -> str:
    """Key of the record that claims an attempt's number; numbers are claimed without gaps."""
    return f"attempts/{attempt}/start.json"


class Fence:
    """Whether `attempt` is still the newest of its run.

    The store decides: a newer attempt has created the record of the next number, which only one can.
    """

    def __init__(self, store: Store, attempt: int) -> None:
        self.attempt = attempt
        self._store = store
        self._lost = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def check(self) -> None:
        """Look into the store; raise Superseded if a newer attempt has begun, StorageError if it does not answer."""
        self._lost = self._lost or self._store.exists(record(self.attempt + 1))
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """Raise Superseded if a look has found a newer attempt. Never waits."""
        if self._lost:
            raise Superseded(
                f"{self._store.url}: attempt {self.attempt + 1} has begun; attempt {self.attempt} is not the newest "
                "and may write nothing more",
                "let the newer one run; if it was started by mistake, stop it and start the command again",
            )

    def watch(self, every_s: float) -> None:
        """Look every so many seconds on a thread, until `close`. A store that does not answer proves nothing."""

        def look() -> None:
            while not self._end.wait(every_s):
                try:
                    self.check()
                except StorageError as error:
                    _LOG.info("whether a newer attempt has begun is not known: %s", error)
                except Superseded:
                    return

        self._thread = threading.Thread(target=look, name="fence", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._end.set()
