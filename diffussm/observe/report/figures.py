"""The report's charts as plotly figures in plain data. Pure: a page colours them by its theme.

Colours are names of roles (`accent`, `muted`, ...), which the page replaces by its theme's own.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from diffussm.observe.goodput import CAUSES
from diffussm.observe.report.gather import Story
from diffussm.observe.scalars import is_failure

Figure = dict[str, Any]

CAUSE_COLOURS = {
    "step": "good", "data": "amber", "save": "blue", "restore": "violet", "start": "muted", "replayed": "orange",
    "idle": "bad",
}  # fmt: skip
FAULTS = (
    "failure", "stopped", "hang", "non-finite step", "save failed", "averages save failed", "checkpoint refused",
    "local checkpoints refused", "delete failed", "averages delete failed", "straggler", "bad node",
    "places not stored", "evaluation failed", "samples failed", "encoder lost", "error",
)  # fmt: skip
"""Events that are drawn as faults, matched at the beginning of their name; a `failure` by request is none."""
TOLD_AGAIN = ("stopped", "hang")
"""Those that the `failure` of the same start tells once more."""
COLOURS = ("accent", "amber", "violet", "good", "orange", "blue", "bad")
SAMPLER = ("sampler", "steps", "guidance", "guidance_channels", "seed")
"""Settings of an evaluation's sampler that decide its score."""
SMOOTH_SHARE = 0.03
"""Share of the curve that one smoothed point averages over, about."""


def figures(story: Story) -> dict[str, Figure]:
    """Chart by name, only those for which there is something to show."""
    made = {
        "loss": loss(story),
        "score": score(story),
        "throughput": curve(story, "images_per_s", "images/s"),
        "grad_norm": curve(story, "grad_norm", "gradient norm", log=True),
        "lr": curve(story, "lr", "learning rate"),
        "goodput": goodput(story),
        "timeline": timeline(story),
    }
    return {name: figure for name, figure in made.items() if figure["data"]}


def loss(story: Story) -> Figure:
    """Loss over images: each logged mean, a smoothed line, and the timestep quartiles where they were logged."""
    points = [(m["images"], m["loss"]) for m in story.metrics if m.get("loss") is not None]
    x, y = [p[0] for p in points], [p[1] for p in points]
    data = []
    if x:
        data = [_line(x, y, "logged", "muted", width=1), _line(x, smoothed(y), "smoothed", "accent", width=2.5)]
    for quartile, colour in zip(range(1, 5), ("blue", "good", "amber", "bad"), strict=True):
        key = f"loss_q{quartile}"
        some = [(m["images"], m[key]) for m in story.metrics if m.get(key) is not None]
        if some:
            trace = _line([p[0] for p in some], smoothed([p[1] for p in some]), f"quartile {quartile} of t", colour)
            data.append(trace | {"visible": "legendonly"})
    return _figure(data, "images", "loss", xtype="linear", ytype="log")


def score(story: Story) -> Figure:
    """Each distance over images with its interval, and the floor of real against real as a dashed line.

    One line joins what compares: scores of one metric, count, kind of weights and sampler.
    """
    lines: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for result in story.evaluations:
        if result["leads"]:  # the others have scales of their own; the table shows them
            lines.setdefault(comparable(result), []).append(result)
    data: list[dict[str, Any]] = []
    floors: set[tuple[str, ...]] = set()
    for (made, results), colour in zip(lines.items(), itertools.cycle(COLOURS), strict=False):
        metric, count = made[:2]
        # Only what tells the lines apart is named.
        varied = [part for place, part in enumerate(made) if place == 0 or len({key[place] for key in lines}) > 1]
        name = ", ".join(filter(None, varied))
        x, y = [r["at_images"] for r in results], [r["value"] for r in results]
        trace = _line(x, y, name, colour, width=2) | {"mode": "lines+markers"}
        intervals = [r.get("interval") for r in results]
        if all(isinstance(i, list | tuple) and len(i) == 2 for i in intervals):
            pairs = [(float(i[0]), float(i[1])) for i in intervals if i is not None]
            trace["error_y"] = {
                "type": "data", "symmetric": False,
                "array": [max(0.0, high - v) for (_, high), v in zip(pairs, y, strict=True)],
                "arrayminus": [max(0.0, v - low) for (low, _), v in zip(pairs, y, strict=True)],
            }  # fmt: skip
        data.append(trace)
        if isinstance(results[-1].get("floor"), int | float) and made[:2] not in floors:
            floors.add(made[:2])  # real against real knows no sampler
            ends = [e["at_images"] for key, some in lines.items() if key[:2] == made[:2] for e in some]
            words = f"{metric}, {count}" if len({key[1] for key in lines}) > 1 else metric
            floor = _line([min(ends), max(ends)], [results[-1]["floor"]] * 2, f"{words}: real against real", colour, 1)
            data.append(floor | {"line": floor["line"] | {"dash": "dash"}})
    return _figure(data, "images", "score (lower is better)")


def comparable(result: Mapping[str, Any]) -> tuple[str, ...]:
    """What scores on one line have in common: metric, count, kind of weights, then each setting of the sampler."""
    sampler = result.get("sampler") or {}
    settings = (f"{key} {sampler[key]}" if key in sampler else "" for key in SAMPLER)
    return str(result.get("metric", "score")), f"n = {result.get('n', 0):,}", str(result.get("weights", "")), *settings


def curve(story: Story, key: str, title: str, *, log: bool = False) -> Figure:
    """One logged number over images."""
    points = [(m["images"], m[key]) for m in story.metrics if m.get(key) is not None]
    data = [_line([p[0] for p in points], [p[1] for p in points], title, "accent")] if points else []
    return _figure(data, "images", title, ytype="log" if log else "linear")


def goodput(story: Story) -> Figure:
    """One stacked bar: seconds of the run by cause."""
    book = story.goodput
    data = [
        {
            "type": "bar", "orientation": "h", "y": ["time"], "x": [book.seconds[cause]], "name": cause,
            "marker": {"color": CAUSE_COLOURS[cause]},
            "hovertemplate": f"{cause}: %{{x:,.1f}} s, {book.seconds[cause] / book.total_s:.1%}<br>{meaning}"
            "<extra></extra>",
        }
        for cause, meaning in CAUSES.items()
        if book.total_s > 0
    ]  # fmt: skip
    figure = _figure(data, "seconds", "")
    figure["layout"] |= {"barmode": "stack", "height": 190, "hovermode": "closest"}
    figure["layout"]["yaxis"] |= {"visible": False, "type": "category"}
    return figure


def timeline(story: Story) -> Figure:
    """Each attempt as a bar in time, with its events on it; faults stand out."""
    events = [e for e in story.events if "time" in e and isinstance(e.get("attempt"), int)]
    data: list[dict[str, Any]] = []
    for number in sorted({e["attempt"] for e in events}):
        times = [e["time"] for e in events if e["attempt"] == number]
        start, end = min(times), max(times)
        data.append(
            _line([stamp(start), stamp(end)], [f"start {number}"] * 2, f"start {number}", "muted", width=10)
            | {"hoverinfo": "skip", "showlegend": False}
        )
    for name, colour, symbol, wanted in (("event", "accent", "circle", False), ("fault", "bad", "x", True)):
        some = [e for e in events if is_fault(e) is wanted]
        if some:
            data.append(
                {
                    "type": "scatter", "mode": "markers", "name": name,
                    "x": [stamp(e["time"]) for e in some], "y": [f"start {e['attempt']}" for e in some],
                    "text": [told(e) for e in some], "hovertemplate": "%{text}<extra></extra>",
                    "marker": {"color": colour, "size": 10, "symbol": symbol},
                }
            )  # fmt: skip
    figure = _figure(data, "", "")
    figure["layout"]["xaxis"] |= {"type": "date"}
    figure["layout"]["yaxis"] |= {"type": "category"}
    figure["layout"] |= {"height": 170 + 36 * len({e["attempt"] for e in events}), "hovermode": "closest"}
    return figure


def is_fault(event: Mapping[str, Any]) -> bool:
    """Whether an event says that something went wrong."""
    name = str(event.get("event", ""))
    return is_failure(event) if name == "failure" else name.startswith(FAULTS)


def count_faults(events: Sequence[Mapping[str, Any]]) -> int:
    """How often something went wrong; what rank 0, the watchdog and the driver tell of one end is one. Pure."""
    failed = {event.get("attempt") for event in events if is_failure(event)}
    doubled = [e for e in events if e.get("event") in TOLD_AGAIN and e.get("attempt") in failed]
    return sum(map(is_fault, events)) - len(doubled)


def told(event: Mapping[str, Any]) -> str:
    """An event in one line."""
    rest = {k: v for k, v in event.items() if k not in ("time", "event", "attempt")}
    return f"{event.get('event', '?')}" + (": " if rest else "") + ", ".join(f"{k} {v}" for k, v in rest.items())


def stamp(seconds: float) -> str:
    """Seconds since 1970 as UTC, as plotly reads dates."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential average without a bias at the beginning. Pure."""
    keep = 1 - 1 / max(1.0, SMOOTH_SHARE * len(values))
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out


def _line(x: Sequence[Any], y: Sequence[Any], name: str, colour: str, width: float = 2) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "name": name,
        "line": {"color": colour, "width": width},
    }  # fmt: skip


def _figure(data: list[dict[str, Any]], x: str, y: str, *, xtype: str = "linear", ytype: str = "linear") -> Figure:
    layout = {
        "margin": {"l": 64, "r": 16, "t": 16, "b": 44},
        "height": 320,
        "hovermode": "x unified",
        "legend": {"orientation": "h", "y": 1.12},
        "xaxis": {"title": {"text": x}, "type": xtype, "automargin": True},
        "yaxis": {"title": {"text": y}, "type": ytype, "automargin": True},
    }
    return {"data": data, "layout": layout}
