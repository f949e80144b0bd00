"""Setting a damaged checkpoint aside: its manifest becomes a note that says why, its files stay for a look."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from diffussm.checkpoint.manifest import MANIFEST
from diffussm.checkpoint.store import NotFound, Store

NOTE = "quarantine.json"


def quarantine(store: Store, folder: str, wrong: Sequence[str], attempt: int) -> None:
    """Make `folder` no checkpoint any more: without a manifest there is none. One writer.

    The note holds the reasons and the manifest as it was; a kill between the two writes leaves both, and the next
    start does it again.
    """
    try:
        manifest = store.read(f"{folder}/{MANIFEST}").decode(errors="replace")
    except NotFound:
        manifest = ""
    note = {"reasons": list(wrong), "attempt": attempt, "time": round(time.time(), 3), "manifest": manifest}
    store.write(f"{folder}/{NOTE}", json.dumps(note, indent=1).encode())
    store.delete(f"{folder}/{MANIFEST}")
