"""`python -m diffussm.bench WHAT`: print a table, or JSON with --json; see `diffussm bench`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from diffussm.bench import block, op, parts
from diffussm.bench.machine import describe
from diffussm.errors import DiffuSSMError
from diffussm.ops import registry


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line that `launch` renders."""
    parser = argparse.ArgumentParser(prog="diffussm bench", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=tuple(_BENCHES))
    parser.add_argument("config", nargs="?", default="", help="for loop, log, data, evaluate: the run that is measured")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--lengths", type=_numbers, default=[64, 256, 1024, 4096, 16384])
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 32])
    parser.add_argument("--widths", type=_numbers, default=[384, 1152])
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(op.MODES))
    parser.add_argument("--backends", type=lambda text: text.split(","), help="for op; without it all usable ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--url", default="", help="for data: folder or s3:// URL of latents and tars; for save and evaluate: a folder"
    )
    parser.add_argument("--ranks", type=_numbers, default=[1, 2, 4])
    parser.add_argument("--preset", default="B", help="for save: the network, of --depth blocks; B with 10 has 105M")
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--samples", type=int, default=16_384)
    parser.add_argument("--images", type=int, default=128, help="for evaluate: pictures of one evaluation")
    parser.add_argument("--workers", type=_numbers, default=[1, 2], help="for evaluate: processes of --threads each")
    parser.add_argument(
        "--manifold", type=_numbers, default=[10_000, 50_000, 2048],
        help="for evaluate: real and generated pictures and numbers of a feature for precision and recall",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    asked = parse(arguments)
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(asked.threads)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    try:
        rows = _BENCHES[asked.what](asked, device)
    except DiffuSSMError as error:
        print(f"diffussm: {type(error).__name__}: {error}", file=sys.stderr)
        return int(error.code)
    if asked.json:
        print(json.dumps({"machine": describe(device), "rows": rows}, indent=1))
    else:
        _show(rows, f"{asked.what} on {describe(device)}; {asked.rounds} interleaved rounds, medians")
    return 0


def _op(asked: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    found = [verdict.name for verdict in registry.survey(device, dtype) if verdict.usable]
    usable = asked.backends or [name for name in found if name != "reference"]
    rows = op.bench(
        asked.lengths, asked.batches, asked.widths,
        backends=usable, device=device, dtype=dtype, repeats=asked.rounds, modes=asked.modes,
    )  # fmt: skip
    return [asdict(row) for row in rows]


def _parts(asked: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    found = [verdict.name for verdict in registry.survey(device, torch.float32) if verdict.usable]
    usable = asked.backends or [name for name in found if name != "reference"]
    sizes = [(length, batch, width) for length in asked.lengths for width in asked.widths for batch in asked.batches]
    rows = [parts.bench_parts(*size, backends=usable, rounds=asked.rounds, device=device) for size in sizes]
    return [asdict(row) for group in rows for row in group]


def _block(asked: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    sizes = [(length, batch, width) for length in asked.lengths for width in asked.widths for batch in asked.batches]
    return [asdict(block.bench_block(*size, rounds=asked.rounds, device=device)) for size in sizes]


def _loop(asked: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    from diffussm.bench.loop import bench_loop
    from diffussm.config import check, load
    from diffussm.data.encode import prepare

    cfg = load(asked.config or "configs/quickstart.yaml", asked.overrides)
    check(cfg)
    prepare(cfg)
    return [asdict(bench_loop(cfg, rounds=asked.rounds))]


def _log(asked: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    from diffussm.bench.log import bench_log
    from diffussm.config import check, load
    from diffussm.data.encode import prepare

    cfg = load(asked.config or "configs/quickstart.yaml", asked.overrides)
    check(cfg)
    prepare(cfg)
    return [asdict(row) for row in bench_log(cfg, rounds=asked.rounds)]


def _data(asked: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    from diffussm.bench.data import bench_data
    from diffussm.bench.loop import bench_loop
    from diffussm.config import check, load
    from diffussm.data.encode import prepare

    cfg = load(asked.config or "configs/quickstart.yaml", asked.overrides)
    check(cfg)
    prepare(cfg)
    eaten = bench_loop(cfg, rounds=5, steps=3).ours_steps_per_s * cfg.train.global_batch
    print(f"one worker trains on {eaten:.0f} samples/s", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="diffussm-bench-") as folder:
        rows = bench_data(
            cfg, asked.url or folder, ranks=asked.ranks, samples=asked.samples, rounds=asked.rounds,
            train_samples_per_s=eaten,
        )  # fmt: skip
    return [asdict(row) for row in rows]


def _save(asked: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    from pathlib import Path

    from diffussm.bench.save import bench_save
    from diffussm.config.schema import ModelConfig

    model = ModelConfig(preset=asked.preset, depth=asked.depth)
    with tempfile.TemporaryDirectory(prefix="diffussm-bench-", dir=asked.url or None) as folder:
        return [asdict(row) for row in bench_save(model, Path(folder), rounds=asked.rounds)]


def _evaluate(asked: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    from pathlib import Path

    from diffussm.bench.evaluate import bench_evaluate, bench_manifold
    from diffussm.config import check, load
    from diffussm.data.encode import prepare

    cfg = load(asked.config or "configs/quickstart.yaml", asked.overrides)
    check(cfg)
    prepare(cfg)
    cfg.cluster.threads_per_worker = asked.threads
    with tempfile.TemporaryDirectory(prefix="diffussm-bench-", dir=asked.url or None) as folder:
        rows = bench_evaluate(cfg, Path(folder), workers=asked.workers, images=asked.images, rounds=asked.rounds)
    return [asdict(row) for row in [*rows, bench_manifold(*asked.manifold)]]


_BENCHES = {
    "op": _op, "parts": _parts, "block": _block, "loop": _loop, "data": _data, "save": _save, "evaluate": _evaluate,
    "log": _log,
}  # fmt: skip


def _show(rows: list[dict[str, Any]], title: str) -> None:
    """A table on a terminal; in a pipe as wide as its content."""
    console = Console(width=None if sys.stdout.isatty() else 220)
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
