"""`python -m diffussm.export CONFIG --to DIR [key=value ...]`; `diffussm export` becomes this."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffussm.config import check, load
from diffussm.errors import DiffuSSMError, UsageError
from diffussm.export.folder import export, push


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line that `launch` renders."""
    parser = argparse.ArgumentParser(prog="diffussm export", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--to", type=Path, required=True, help="folder to be made")
    parser.add_argument("--checkpoint", type=int, help="images of the checkpoint; default: the newest")
    parser.add_argument("--licence", default="", help="SPDX identifier for the model card")
    parser.add_argument("--push", default="", metavar="OWNER/NAME", help="upload to this place on Hugging Face's hub")
    parser.add_argument("--public", action="store_true", help="make that place public; default: private")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, and return the exit code."""
    asked = parse(arguments)
    try:
        if asked.public and not asked.push:
            raise UsageError("--public: found without --push", "name the place with --push, or leave --public out")
        cfg = load(asked.config, asked.overrides)
        check(cfg)
        folder = export(
            cfg,
            asked.to,
            images=asked.checkpoint,
            licence=asked.licence,
            announce=lambda line: print(line, file=sys.stderr),
        )
        print(f"{folder}: weights, pipeline and {folder / 'README.md'}")
        if asked.push:
            print(push(folder, asked.push, public=asked.public))
    except DiffuSSMError as error:
        print(f"diffussm: {type(error).__name__}: {error}", file=sys.stderr)
        return int(error.code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
