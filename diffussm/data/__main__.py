"""`python -m diffussm.data PLACE [--verify] [--grid FILE]`: look at a set of latents; `diffussm data` runs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffussm.checkpoint.store import open_store
from diffussm.data import inspect
from diffussm.errors import DataError, DiffuSSMError
from diffussm.observe.log import Narrator

GRID = "latents.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is there; verify it or draw its grid. Returns the exit code: 65 when a hash differs."""
    parser = argparse.ArgumentParser(prog="python -m diffussm.data", description=__doc__)
    parser.add_argument("place", help="folder or s3:// URL of latents or of a run, or a config file")
    parser.add_argument("--verify", action="store_true", help="hold every file against its digest")
    parser.add_argument("--grid", default="", help=f"where the PNG goes (default: {GRID} here; none with --verify)")
    parser.add_argument("--pictures", type=int, default=3, help="pictures of each class in the grid")
    asked = parser.parse_args(arguments)
    try:
        _look(asked)
    except DiffuSSMError as error:
        print(f"diffussm: {type(error).__name__}: {error}", file=sys.stderr)
        return int(error.code)
    return 0


def _look(asked: argparse.Namespace) -> None:
    narrator = Narrator()
    found = inspect.find(asked.place)
    print(inspect.text(found), flush=True)
    if asked.verify:
        wrong = inspect.verify(found, lambda done, total: narrator.work("verify", done, total, "shards"))
        narrator.end()
        if wrong:
            raise DataError(
                f"{found.store.url}: {len(wrong)} failures\n" + "\n".join(wrong),
                "remove the latents and make them again with `diffussm prepare`",
            )
        print("every file is as it was written")
    if asked.grid or not asked.verify:
        source = inspect.source_of(found)
        if isinstance(source, str):
            narrator.say(f"the grid shows no sources: {source}")
        place = Path(asked.grid or GRID).absolute()
        png = inspect.paint(found, None if isinstance(source, str) else source, max(1, asked.pictures))
        open_store(str(place.parent)).write(place.name, png)
        columns = "decoded and mirrored" if isinstance(source, str) else "source, decoded and mirrored"
        print(f"grid: {place} ({columns}, for each picture)")


if __name__ == "__main__":
    sys.exit(main())
