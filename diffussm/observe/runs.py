"""`python -m diffussm.observe.runs status|config ROOT | list STORAGE | check ROOT LATENTS`: a store's answer in JSON.

Commands that look after runs start this instead of importing what reads a bucket; it changes nothing but a probe that
`check` writes and deletes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from diffussm.checkpoint.store import NotFound, Store, open_store
from diffussm.errors import DiffuSSMError, StorageError, UsageError
from diffussm.observe.events import read_journal

_SHOWN = ("loss", "lr", "images_per_s", "step", "epoch")


def status(root: str) -> dict[str, Any]:
    """Where a run stands.

    Returns:
        `found` (whether anything of it is there), `images` of the newest line or checkpoint, `total` of its config,
        `finished`, `checkpoints` (images of each), `attempts`, `metrics` (newest line), `event` (newest event),
        `save_s` (seconds of the newest save; None before the first).
    """
    import yaml

    store = open_store(root)
    metrics, events = (read_journal(store, f"{name}.jsonl") for name in ("metrics", "events"))
    config = yaml.safe_load(_read(store, "config.yaml") or b"{}") or {}
    summary = _read(store, "summary.json")
    folders = {key.split("/")[1] for key in store.keys("checkpoints/") if key.endswith("/manifest.json")}
    checkpoints = sorted(int(folder) for folder in folders if folder.isdecimal())
    newest = metrics[-1] if metrics else {}
    saves = [event["seconds"] for event in events if event.get("event") == "saved" and "seconds" in event]
    return {
        "root": root,
        "found": bool(config or metrics or checkpoints),
        "images": newest.get("images") or max(checkpoints, default=0),
        "total": config.get("train", {}).get("images"),
        "finished": summary is not None,
        "score": json.loads(summary).get("score") if summary else None,
        "checkpoints": checkpoints,
        "attempts": len({key.split("/")[1] for key in store.keys("attempts/")}),
        "metrics": {name: newest[name] for name in _SHOWN if name in newest},
        "event": events[-1] if events else None,
        "save_s": saves[-1] if saves else None,
    }


def config(root: str) -> str:
    """The run's config as it is stored. Raises UsageError if there is none."""
    found = _read(open_store(root), "config.yaml")
    if found is None:
        raise UsageError(f"{root}: found no config.yaml there; allowed: a run's place", "diffussm list shows runs")
    return found.decode()


def listed(storage: str) -> list[str]:
    """Names of the runs in a storage: what has a config."""
    store = open_store(storage)
    return [folder for folder in store.folders() if _is_run(store, folder)]


def _is_run(store: Store, folder: str) -> bool:
    try:
        return store.exists(f"{folder}/config.yaml")
    except StorageError as error:
        if isinstance(error.__cause__, PermissionError):  # somebody else's
            return False
        raise


def check(root: str, latents: str) -> dict[str, Any]:
    """Whether the run's place can be written and what the latents say of themselves (None: there are none yet)."""
    open_store(root).check_writable()
    passport = _read(open_store(latents), "passport.json")
    made = json.loads(passport) if passport else None
    return {"writable": True, "latents": None if made is None else {"number": made.get("number"), "place": latents}}


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except NotFound:
        return None


def main(arguments: Sequence[str]) -> int:
    """Print what was asked for as JSON; a typed error in two lines, with its exit code."""
    verbs: dict[str, tuple[Callable[..., Any], int]] = {
        "status": (status, 1), "config": (config, 1), "list": (listed, 1), "check": (check, 2),
    }  # fmt: skip
    try:
        verb, count = verbs.get(arguments[0] if arguments else "", (None, 0))
        if verb is None or len(arguments) != count + 1:
            raise UsageError(f"found {list(arguments)!r}; allowed: {', '.join(verbs)} with their places")
        print(json.dumps(verb(*arguments[1:])))
    except DiffuSSMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return int(error.code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
