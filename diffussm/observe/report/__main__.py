"""`python -m diffussm.observe.report CONFIG [--to FILE] [key=value ...]`; `diffussm report` becomes this."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffussm.checkpoint.store import open_store
from diffussm.config import load
from diffussm.errors import DiffuSSMError
from diffussm.naming import RunPaths
from diffussm.observe.report.gather import gather
from diffussm.observe.report.page import render

NAME = "report.html"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line that `launch` renders."""
    parser = argparse.ArgumentParser(prog="diffussm report", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--to", default="", help=f"where the page goes; default: {NAME} in the run's own place")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, print where the time went, and return the exit code."""
    asked = parse(arguments)
    try:
        cfg = load(asked.config, asked.overrides)
        paths = RunPaths(cfg.storage, cfg.name)
        store = open_store(paths.root)
        story = gather(store, cfg.name)
        page = render(story).encode()
        place = Path(asked.to).absolute() if asked.to else None
        if place is None:
            store.write(NAME, page)
        else:
            open_store(str(place.parent)).write(place.name, page)
        print(story.goodput.table())
        print(f"report: {place or f'{paths.root}/{NAME}'}")
    except DiffuSSMError as error:
        print(f"diffussm: {type(error).__name__}: {error}", file=sys.stderr)
        return int(error.code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
