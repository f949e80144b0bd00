"""The one entry inside a job: `python -m cluster.driver [--only STAGE] CONFIG [key=value ...]`.

Without `--only` the whole road is run: latents if there are none, training, samples, score. Started again under the
same name it goes on where it was, and does nothing when the run is finished.
"""

from __future__ import annotations

import argparse
import csv
import signal
import sys
import traceback
from collections.abc import Sequence

from diffussm.config import check, load, preset
from diffussm.errors import DiffuSSMError, ExitCode


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line that `launch` renders."""
    parser = argparse.ArgumentParser(prog="python -m cluster.driver", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--only", choices=("prepare", "train", "sample", "evaluate", "reference"), help="one stage instead of all"
    )
    parser.add_argument("--classes", default="", help="rows of the sample grid, separated by commas (--only sample)")
    parser.add_argument("--grid", default="", help="file of the sample grid (--only sample)")
    parser.add_argument("--npz", default="", help="file of the pictures (--only sample, evaluate, reference)")
    parser.add_argument("--strip", default="", help="a strip instead of the grid (--only sample)")
    parser.add_argument("--values", default="", help="settings of a strip, separated by commas (--only sample)")
    parser.add_argument("--checkpoint", type=int, help="images of the checkpoint; default: the newest")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code; a typed error is told in two lines, any other with its traceback."""
    early: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a warning may come while the imports below take seconds
        signal.signal(number, lambda got, _: early.append(got))
    asked = parse(arguments)
    try:
        cfg = load(asked.config, asked.overrides)
        check(cfg)
        recipe = preset(asked.config)
        from cluster.stages import Stages, Warnings  # after the config is known to be good: this imports torch

        warnings = Warnings(cfg.cluster.grace_s)
        warnings.install()
        for got in early[:1]:
            signal.raise_signal(got)
        stages = Stages.of(cfg, warnings, recipe)
        match asked.only:
            case None:
                stages.all()
            case "prepare":
                stages.prepare()
            case "train":
                stages.begin()
                try:
                    stages.train()
                finally:
                    stages.end()
            case "sample":
                classes, values = listed(asked.classes), listed(asked.values)
                if asked.strip:
                    stages.strip(asked.strip, classes, values, asked.grid, asked.checkpoint)
                else:
                    stages.sample(classes, asked.grid, asked.checkpoint, asked.npz)
            case "evaluate":
                stages.evaluate(asked.checkpoint, asked.npz)
            case "reference":
                stages.reference(asked.npz)
    except DiffuSSMError as error:
        print(f"diffussm: {type(error).__name__}: {error}", file=sys.stderr)
        return int(error.code)
    except KeyboardInterrupt:
        print("diffussm: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception:  # noqa: BLE001 - the edge of the program: a bug is shown whole and has its own exit code
        traceback.print_exc()
        return int(ExitCode.INTERNAL)
    return int(ExitCode.DONE)


def listed(text: str) -> list[str]:
    """Words between commas; one that has a comma itself, as names of ImageNet's classes do, stands in double quotes."""
    return [word for word in next(csv.reader([text], skipinitialspace=True), []) if word]


if __name__ == "__main__":
    sys.exit(main())
