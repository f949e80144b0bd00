from __future__ import annotations

import json
from pathlib import Path

from diffussm.checkpoint.manifest import MANIFEST
from diffussm.checkpoint.quarantine import NOTE, quarantine
from diffussm.checkpoint.store import LocalStore


def test_the_note_tells_why_and_keeps_the_manifest(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.write(f"c/1/{MANIFEST}", b"{}")
    store.write("c/1/r0.safetensors", b"x")
    quarantine(store, "c/1", ["r0 has digest a, written was b"], 4)
    assert set(store.keys()) == {f"c/1/{NOTE}", "c/1/r0.safetensors"}
    note = json.loads(store.read(f"c/1/{NOTE}"))
    assert (note["reasons"], note["attempt"], note["manifest"]) == (["r0 has digest a, written was b"], 4, "{}")
    quarantine(store, "c/1", ["again"], 5)  # as after a kill between note and deletion
