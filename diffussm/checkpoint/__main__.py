"""`diffussm checkpoints` and `diffussm ema` as a job: python -m diffussm.checkpoint list|show|export|ema RUN."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from math import prod
from typing import Any

from diffussm.checkpoint import catalog, posthoc
from diffussm.checkpoint.profiles import gamma
from diffussm.checkpoint.store import Store
from diffussm.config.rules import POWER_WIDTHS
from diffussm.errors import DataError, DiffuSSMError, ExitCode, UsageError
from diffussm.naming import join, power_name

COARSE = 0.05
"""Error of a fit from which on a warning is given."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line that `launch` renders."""
    parser = argparse.ArgumentParser(prog="python -m diffussm.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("list", "show", "export", "ema"))
    parser.add_argument("run", help="folder or s3:// URL of a run")
    parser.add_argument("--at", type=int, help="images of the checkpoint, or of the average")
    parser.add_argument("--verify", action="store_true", help="read every byte (list, show)")
    parser.add_argument("--kind", default="master", help="what to export")
    parser.add_argument("--to", default="", help="file to write (export, ema)")
    parser.add_argument("--length", type=float, help="relative width of the average (ema)")
    parser.add_argument("--dry-run", action="store_true", help="write nothing (ema)")
    parser.add_argument("--json", action="store_true", help="as JSON (list, show)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do it and return the exit code; a typed error is told in two lines."""
    asked = parse(arguments)
    try:
        store = catalog.open_run(asked.run)
        {"list": _list, "show": _show, "export": _export, "ema": _ema}[asked.what](store, asked)
    except DiffuSSMError as error:
        print(f"diffussm: {type(error).__name__}: {error}", file=sys.stderr)
        return int(error.code)
    return int(ExitCode.DONE)


def _list(store: Store, asked: argparse.Namespace) -> None:
    found = catalog.entries(store, verify=asked.verify)
    if asked.json:
        print(json.dumps([_plain(entry, verified=asked.verify) for entry in found], indent=1))
    else:
        rows = [["what", "images", "bytes", "files", "written (UTC)", "kept", "state", "kinds"]]
        for entry in found:
            plain = _plain(entry, verified=asked.verify)
            cells = [plain["what"], plain["images"], plain["bytes"], plain["files"]]
            cells += [_when(plain["created"]), plain["kept"], plain["state"], ", ".join(plain["kinds"])]
            rows.append([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells])
        _table(rows, right=(1, 2, 3))
        print(f"{len(found)} in {store.url}, {sum(entry.size_bytes for entry in found):,} bytes")
    wrong = [line for entry in found for line in entry.wrong]
    if wrong:
        raise DataError("\n".join(wrong), "a run passes over what does not verify and goes on from the one before")


def _plain(entry: catalog.Entry, *, verified: bool) -> dict[str, Any]:
    """An entry as plain data; times in seconds since 1970."""
    manifest = entry.manifest
    return {
        "what": "checkpoint" if entry.folder.startswith(catalog.CHECKPOINTS) else "averages",
        "folder": entry.folder,
        "images": manifest.counters.images if manifest else entry.folder.rpartition("/")[2],
        "bytes": entry.size_bytes,
        "files": len(manifest.files) if manifest else 0,
        "created": manifest.created if manifest else 0.0,
        "kept": "for ever" if manifest and manifest.permanent else "newest",
        "state": "unusable" if entry.wrong else "verified" if verified else "not read",
        "kinds": list(manifest.kinds) if manifest else [],
    }


def _when(seconds: float) -> str:
    """A time since 1970 to the second, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if seconds else "?"


def _show(store: Store, asked: argparse.Namespace) -> None:
    folder, manifest = catalog.select(store, asked.at)
    if asked.json:
        print(manifest.to_json().decode())
        return
    facts = {
        "checkpoint": join(store.url, folder),
        **{name: f"{value:,}" for name, value in vars(manifest.counters).items()},
        "written (UTC)": _when(manifest.created),
        "kept": "for ever" if manifest.permanent else "while it is among the newest",
        "run": manifest.run_id,
        "attempt": manifest.attempt,
        "world size": manifest.world_size,
        "ZeRO stage": manifest.zero_stage,
        "config": manifest.config_digest,
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "kinds": ", ".join(manifest.kinds),
        "parameters": f"{sum(map(prod, manifest.shapes.values())):,} in {len(manifest.shapes)} tensors",
    }
    _table([[name, str(value)] for name, value in facts.items()])
    print()
    rows = [["file", "bytes", "XXH3-128", "slices"]]
    rows += [[file.name, f"{file.size:,}", file.xxh3, str(len(file.pieces))] for file in manifest.files]
    _table(rows, right=(1, 3))
    print()
    held: dict[str, list[str]] = {}
    for rank, file in enumerate(manifest.files):
        for piece in file.pieces:
            held.setdefault(piece.name, []).append(f"{rank}: {piece.start:,}+{piece.numel:,}")
    rows = [["parameter", "shape", "file: start+elements"]]
    for name, shape in manifest.shapes.items():
        rows.append([name, " x ".join(map(str, shape)) or "scalar", ", ".join(held.get(name, []))])
    _table(rows)
    print()
    rows = [["tensor", "dtype", "digest of all slices"]]
    _table(rows + [[key, manifest.dtypes.get(key, "?"), seal] for key, seal in manifest.digests.items()])


def _export(store: Store, asked: argparse.Namespace) -> None:
    if not asked.to:
        raise UsageError("--export: no file is named", "add --to FILE")
    folder, kind, size = catalog.export(store, asked.kind, asked.at, asked.to)
    print(f"{kind} of {join(store.url, folder)}: {asked.to}, {size:,} bytes")


def _ema(store: Store, asked: argparse.Namespace) -> None:
    low, high = POWER_WIDTHS
    if asked.length is None or not low <= asked.length <= high:
        raise UsageError(f"--length: found {asked.length}; allowed: {low} to {high}", "0.05 to 0.2 are common")
    made = posthoc.recipe(store, asked.length, asked.at, lambda line: print(line, file=sys.stderr))
    rows = [["images", "average", "coefficient"]]
    rows += [[f"{t.manifest.counters.images:,}", t.kind, f"{t.coefficient:+.6g}"] for t in made.terms]
    _table(rows, right=(0, 2))
    print(
        f"sigma_rel {asked.length:g} (gamma {gamma(asked.length):.4g}) after {made.wanted.images:,} images from "
        f"{len(made.terms)} stored averages: error {made.fit.error:.3g} of the profile's norm, correlation "
        f"{made.fit.correlation:.8f}, sum of absolute coefficients {made.fit.gain:.4g}"
    )
    if made.fit.error >= COARSE:
        print(
            f"diffussm: warning: the fit is coarse (error {made.fit.error:.3g}); snapshots must lie closer together "
            "(train.ema_snapshot_images), or --length nearer to train.power_ema",
            file=sys.stderr,
        )
    if asked.dry_run:
        return
    target = asked.to or join(store.url, "weights", f"{made.wanted.images:012d}-{_named(asked.length)}.safetensors")
    size = posthoc.write(store, made, target)
    print(f"written: {target}, {size:,} bytes; draw from it with: diffussm sample {store.url} --weights {target}")


def _named(sigma_rel: float) -> str:
    """power-0.120, with more decimals where three do not tell the width."""
    return power_name(sigma_rel) if round(sigma_rel, 3) == sigma_rel else f"power-{sigma_rel!r}"


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Columns as wide as their content, two spaces between; those in `right` are numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
