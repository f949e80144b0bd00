"""`python -m diffussm.observe.report RUN`: what a run's journals tell, section by section, as text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from diffussm.checkpoint.store import Store, open_store
from diffussm.errors import DiffuSSMError, ExitCode
from diffussm.observe.goodput import goodput

SECTIONS: dict[str, Callable[[Store], str]] = {
    "goodput": lambda store: goodput(store).table(),
}
"""Name -> text of a section, in the order in which they are shown."""


def report(store: Store) -> str:
    """All sections of the run in `store`."""
    return "\n\n".join(section(store) for section in SECTIONS.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report of one run and return the exit code."""
    (run,) = sys.argv[1:] if arguments is None else arguments
    try:
        print(report(open_store(run)))
    except DiffuSSMError as error:
        print(f"diffussm: {type(error).__name__}: {error}", file=sys.stderr)
        return int(error.code)
    return int(ExitCode.DONE)


if __name__ == "__main__":
    sys.exit(main())
