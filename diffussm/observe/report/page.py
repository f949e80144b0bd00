"""The report as one HTML page that needs nothing else: no network, no folder beside it."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffussm.config.explain import PRIVATE_SECTIONS, describe, plain_text
from diffussm.config.frozen import plain
from diffussm.observe.goodput import CAUSES
from diffussm.observe.report.figures import count_faults, figures, is_fault, stamp, told
from diffussm.observe.report.gather import Grid, Story
from diffussm.observe.scalars import is_failure
from diffussm.observe.words import duration

TEMPLATE = "page.html.j2"
MOST_EVENTS = 400
"""Newest events that the table lists; the timeline shows all."""


@dataclass(frozen=True)
class Row:
    """One key of the config."""

    key: str
    value: str
    before: str
    """What the file that the config began from says, or the default."""
    help: str
    differs: bool
    """From that."""


def render(story: Story, *, now: float | None = None) -> str:
    """The page of a run; `now` is the time it is written at, in seconds since 1970."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("diffussm.observe.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    plain, variants = [g for g in story.grids if not g.variant], [g for g in story.grids if g.variant]
    charts = figures(story)
    return environment.get_template(TEMPLATE).render(
        story=story,
        tiles=tiles(story),
        state=state(story),
        written=stamp(time.time() if now is None else now),
        charts=charts,
        charts_json=for_script(charts),
        grids=[{"images": g.images, "source": source(g)} for g in plain],
        grids_json=for_script([{"images": f"{g.images:,}", "source": source(g)} for g in plain]),
        variants=[{"images": g.images, "variant": g.variant, "source": source(g)} for g in variants],
        comparison=comparison(story.evaluations),
        goodput=[(cause, story.goodput.seconds[cause], meaning) for cause, meaning in CAUSES.items()],
        events=[
            (stamp(e.get("time", 0.0)), e.get("attempt", ""), told(e), is_fault(e))
            for e in story.events[-MOST_EVENTS:][::-1]
        ],
        config=rows(story.config, story.preset.get("config", {})),
        preset=str(story.preset.get("file", "")),
        environment=environment_rows(story),
        plotly=get_plotlyjs(),
    )


def state(story: Story) -> str:
    """finished, trained, preempted, stopped, or underway: what the run's own files say of its newest start."""
    if story.summary is not None:
        return "finished"
    newest = max((event.get("attempt", 0) for event in story.events), default=0)
    start = [event for event in story.events if event.get("attempt", 0) == newest]
    if any(event.get("event") == "trained" for event in start):
        return "trained"
    # Rank 0 says that it left or stopped, and after it the driver what it makes of that.
    ends = [event for event in start if event.get("event") in ("left", "stopped", "failure")]
    for event in ends:
        if event.get("event") == "stopped" or (event.get("decision") == "stop" and is_failure(event)):
            return "stopped"
    asked = any(event.get("cause") == "preemption" for event in ends)
    return "preempted" if asked else "underway or interrupted"


def tiles(story: Story) -> list[tuple[str, str, str]]:
    """(what, value, remark) for the row of numbers at the top."""
    total, faults = story.total_images, count_faults(story.events)
    last: Mapping[str, Any] = story.metrics[-1] if story.metrics else {}
    share = f"{story.images / total:.1%} of {total:,}" if total else ""
    made = [("images", f"{story.images:,}", share)]
    if last.get("images_per_s"):
        rate = float(last["images_per_s"])
        left = duration((total - story.images) / rate) if total > story.images else ""
        made.append(("images/s", f"{rate:,.1f}", f"to go {left}" if left else ""))
    if last.get("loss") is not None:
        made.append(("loss", f"{last['loss']:.4f}", f"step {last.get('step', 0):,}"))
    scored = [e for e in story.evaluations if e["leads"]]
    if scored:
        newest = scored[-1]
        floor = newest.get("floor")
        remark = f"n = {newest.get('n', 0):,}" + (
            f"; real against real {floor:.1f}" if isinstance(floor, float) else ""
        )
        made.append((str(newest.get("metric", "score")), f"{newest['value']:.2f}", remark))
    if story.goodput.total_s > 0:
        made.append(("goodput", f"{story.goodput.fraction:.1%}", f"of {duration(story.goodput.total_s)}"))
    made.append(("starts", f"{len(story.attempts)}", f"{faults} fault{'s' if faults != 1 else ''}"))
    return made


def rows(config: Mapping[str, Any], preset: Mapping[str, Any]) -> list[Row]:
    """Keys of the schema with the run's value, and what `preset` says or else the default.

    A key that the run's config does not have is left out, and so are the sections whose values may be secrets: a page
    is sent to people.
    """
    made = []
    for key in describe():
        value = _at(config, key.name)
        if key.name.split(".")[0] in PRIVATE_SECTIONS or (value is None and not key.optional):
            continue
        before = _at(preset, key.name)
        if before is None and (not preset or not key.optional):
            before = plain(key.default)
        # As values: 600.0 in a file is the default 600.
        made.append(Row(key.name, plain_text(value), plain_text(before), key.help, differs=value != before))
    return made


def _at(config: Mapping[str, Any], name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def comparison(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One line for each evaluation: weights, guidance and sampler beside the score, so that settings compare."""
    lines = []
    for result in evaluations:
        sampler = result.get("sampler") or {}
        value, floor = result.get("value"), result.get("floor")
        lines.append(
            {
                "images": f"{result['at_images']:,}",
                "metric": str(result.get("metric", "?")),
                "value": f"{value:.2f}" if isinstance(value, int | float) else "-",
                "floor": f"{floor:.2f}" if isinstance(floor, int | float) else "-",
                "n": f"{result.get('n', 0):,}",
                "weights": str(result.get("weights", "-")),
                "guidance": str(sampler.get("guidance", "-")),
                "sampler": f"{sampler.get('sampler', '-')}, {sampler.get('steps', '-')} steps",
            }
        )
    return lines


def environment_rows(story: Story) -> list[tuple[str, str]]:
    """Software of the newest checkpoint, and where each attempt ran."""
    made = [(name, str(version)) for name, version in sorted(story.versions.items())]
    for record in story.attempts:
        known = {k: v for k, v in record.items() if k not in ("attempt", "time")}
        when = f"{stamp(record['time'])} UTC; " if "time" in record else ""
        made.append((f"start {record['attempt']}", when + ", ".join(f"{k} {v}" for k, v in known.items())))
    return made


def source(grid: Grid) -> str:
    """A picture as a data URL."""
    return "data:image/png;base64," + base64.b64encode(grid.png).decode()


def for_script(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
