"""The live picture of a training on a terminal. Pure: what is known changes by records, and is drawn for a width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from diffussm.observe.scalars import is_failure
from diffussm.observe.words import count, duration, short

NARROW = 76
"""Columns below which two pairs of a name and a value stand side by side, not three."""
BARS = "▁▂▃▄▅▆▇█"
CURVE = 48
"""Losses that the little curve shows at most."""


@dataclass(frozen=True)
class Known:
    """What the records of a start have told."""

    name: str = ""
    progress: Mapping[str, Any] | None = None
    """The newest `progress` record."""
    losses: tuple[float, ...] = ()
    workers: int = 0
    start: int = 1
    checkpoint: int | None = None
    """Images of the newest checkpoint in storage."""
    saved_s: float | None = None
    """When that was told, on the clock of `draw`; None for the one that a start went on from."""
    faults: int = 0
    """Of all starts."""
    fault: str = ""
    """The last one."""

    def hear(self, record: Mapping[str, Any], now: float) -> Known:
        """What is known after a record that was told at `now`."""
        known = replace(self, start=max(self.start, record.get("attempt", 0)))
        event = record.get("event")
        if record["kind"] == "progress":
            loss = record.get("loss")
            losses = known.losses if loss is None else (*known.losses, float(loss))[-CURVE:]
            return replace(known, progress=record, losses=losses)
        if event in ("started", "resumed"):
            known = replace(known, workers=record.get("world_size", 0))
            if event == "resumed" and record["images"] != known.checkpoint:  # this driver has seen no save of it
                known = replace(known, checkpoint=int(record["images"]), saved_s=None)
            return known
        if event == "saved" and record.get("tier") == "storage":
            return replace(known, checkpoint=int(record["images"]), saved_s=now)
        if is_failure(record):
            return replace(known, faults=known.faults + 1, fault=str(record.get("cause", "")))
        return known


def values(known: Known, now: float) -> dict[str, str]:
    """Everything the panel says, by name."""
    told = known.progress or {}
    saved = "none yet"
    if known.checkpoint is not None:
        since = "went on from it" if known.saved_s is None else f"{duration(now - known.saved_s)} ago"
        saved = f"{known.checkpoint:,}  {since}"
    faults = f"{known.faults}" + (f"  last: {known.fault}" if known.fault else "")
    if told.get("nonfinite_steps"):
        faults += f"  skipped steps {told['nonfinite_steps']}"
    work = short(told["macs_per_s"]) + "MAC/s" if told.get("macs_per_s") else "?"
    return {
        "images": f"{told.get('images', 0):,} / {told.get('total', 0):,}",
        "images/s": f"{told.get('images_per_s', 0.0):,.1f}",
        "MFU": f"{told['mfu']:.1%}  {work}" if told.get("mfu") is not None else work,
        "loss": _number(told, "loss", ".4f"),
        "grad norm": _number(told, "grad_norm", ".3g"),
        "lr": _number(told, "lr", ".2g"),
        "ETA": duration(told.get("eta_s", float("inf"))),
        "checkpoint": saved,
        "workers": count(known.workers) + (f"  start {known.start}" if known.start > 1 else ""),
        "faults": faults,
    }


def draw(known: Known, now: float, width: int) -> RenderableType:
    """The panel for a terminal of so many columns."""
    said, told = values(known, now), known.progress or {}
    pairs = 2 if width < NARROW else 3
    table = Table.grid(padding=(0, 1), expand=True)
    for _ in range(pairs):
        table.add_column(style="dim", no_wrap=True)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    cells = [
        (name, Text(value, style="bold red" if name == "faults" and (known.faults or "skipped" in value) else ""))
        for name, value in said.items()
        if name != "images"
    ]
    for at in range(0, len(cells), pairs):
        table.add_row(*(part for cell in cells[at : at + pairs] for part in cell))
    total = max(1, told.get("total", 1))
    head = Table.grid(padding=(0, 1), expand=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=total, completed=told.get("images", 0))
    head.add_row(bar, f"{said['images']} images  {told.get('images', 0) / total:.0%}")
    rows: list[RenderableType] = [head, table]
    if len(known.losses) > 1:
        rows.append(Text.assemble(("loss ", "dim"), (curve(known.losses), "cyan")))
    return Panel(Group(*rows), title=f"diffussm  {known.name}", title_align="left", border_style="dim", width=width)


def curve(losses: tuple[float, ...]) -> str:
    """Losses as a row of bars, the lowest and the highest of them at the ends of the scale."""
    low, high = min(losses), max(losses)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((loss - low) / step)] for loss in losses)


def _number(record: Mapping[str, Any], name: str, form: str) -> str:
    if name not in record:
        return "?"
    value = record[name]
    return "not finite" if value is None else format(value, form)
