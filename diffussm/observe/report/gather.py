"""Everything a report shows, read from a run's store. Works while the run goes on: it only reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from diffussm.checkpoint.manifest import MANIFEST, Manifest
from diffussm.checkpoint.store import NotFound, Store
from diffussm.errors import DataError
from diffussm.observe.events import DRIVER, read_lines
from diffussm.observe.goodput import KEY as GOODPUT
from diffussm.observe.goodput import Goodput, summarize

MOST_GRIDS = 60
"""Grids that go into a page, spread evenly over the training; each is a picture of some 100 kB."""

_GRID = re.compile(r"samples/(\d{12})(?:-(.+))?\.png")
_EVALUATION = re.compile(r"evaluations/(\d{12})-.+\.json")


@dataclass(frozen=True)
class Grid:
    """One picture of the run's `samples` folder."""

    images: int
    """Images the weights had seen."""
    variant: str
    """What it shows beside the plain grid (guidance, ema, ...); empty for that."""
    png: bytes


@dataclass(frozen=True)
class Story:
    """What is known of a run."""

    name: str
    where: str
    config: Mapping[str, Any]
    """The resolved config as plain data; empty before the first start wrote it."""
    preset: Mapping[str, Any]
    """`file` that the config began from, and its resolved `config`; empty if there is none: then the defaults count."""
    metrics: Sequence[Mapping[str, Any]]
    """Logged steps in the order of images; where steps were replayed, the last attempt's."""
    events: Sequence[Mapping[str, Any]]
    grids: Sequence[Grid]
    evaluations: Sequence[Mapping[str, Any]]
    """One record for each score of each evaluation, as `scores_of` makes them; oldest first."""
    attempts: Sequence[Mapping[str, Any]]
    """The record of each start, with its number as `attempt`."""
    goodput: Goodput
    summary: Mapping[str, Any] | None
    """summary.json of a finished run."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Software of the newest checkpoint."""
    unreadable: Sequence[str] = ()
    """Files that could not be understood, and why: they are named on the page."""

    @property
    def total_images(self) -> int:
        """Images the training goes to; 0 if the config is not there yet."""
        return int(self.config.get("train", {}).get("images", 0))

    @property
    def images(self) -> int:
        """Images seen at the last logged step."""
        return int(self.metrics[-1]["images"]) if self.metrics else 0


def gather(store: Store, name: str) -> Story:
    """Read a run.

    Raises:
        DataError: there is no run in `store`.
        StorageError: it cannot be reached.
    """
    wrong: list[str] = []
    config = _parsed(store, "config.yaml", yaml.safe_load, wrong)
    metrics = _lines(store, "metrics.jsonl", wrong)
    events = [event for key in ("events.jsonl", DRIVER) for event in _lines(store, key, wrong)]
    keys = list(store.keys(""))
    if not (config or metrics or events):
        raise DataError(f"{store.url}: no run is there", "name the config or the folder of a run that was started")
    manifests = sorted(key for key in keys if key.startswith("checkpoints/") and key.endswith(f"/{MANIFEST}"))
    return Story(
        name=name,
        where=store.url,
        config=config or {},
        preset=_parsed(store, "preset.yaml", yaml.safe_load, wrong) or {},
        metrics=last_of_each(metrics),
        events=sorted(events, key=lambda event: event.get("time", 0.0)),
        grids=_grids(store, keys),
        evaluations=_evaluations(store, keys, wrong),
        attempts=_attempts(store, keys, wrong),
        goodput=summarize(_lines(store, GOODPUT, wrong)),
        summary=_parsed(store, "summary.json", json.loads, wrong),
        versions=_versions(store, manifests[-1], wrong) if manifests else {},
        unreadable=wrong,
    )


def last_of_each(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One record for each number of images, the last written, in the order of images. Pure."""
    kept = {int(record["images"]): record for record in metrics if "images" in record}
    return [kept[images] for images in sorted(kept)]


def spread(items: Sequence[Grid], most: int) -> list[Grid]:
    """At most `most` of the items, evenly, the first and the last among them. Pure."""
    if len(items) <= most:
        return list(items)
    places = sorted({round(i * (len(items) - 1) / (most - 1)) for i in range(most)})
    return [items[place] for place in places]


def _grids(store: Store, keys: Sequence[str]) -> list[Grid]:
    named = sorted((int(m[1]), m[2] or "", m[0]) for m in map(_GRID.fullmatch, keys) if m)
    plain = spread([Grid(images, "", key.encode()) for images, variant, key in named if not variant], MOST_GRIDS)
    newest = {variant: Grid(images, variant, key.encode()) for images, variant, key in named if variant}
    return [Grid(g.images, g.variant, store.read(g.png.decode())) for g in [*plain, *newest.values()]]


def _evaluations(store: Store, keys: Sequence[str], wrong: list[str]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for match in filter(None, map(_EVALUATION.fullmatch, sorted(keys))):
        result = _parsed(store, match[0], json.loads, wrong)
        try:
            found += scores_of(result, int(match[1])) if result is not None else []
        except (KeyError, TypeError, AttributeError) as error:
            wrong.append(f"{match[0]}: is no result of an evaluation ({error!r})")
    return found


def scores_of(result: Mapping[str, Any], images: int) -> list[Mapping[str, Any]]:
    """Each score of one stored evaluation with what it needs to be judged by. Pure.

    The first, a distance, stands for all: `leads` is true for it.

    Raises:
        KeyError, TypeError, AttributeError: `result` is not what an evaluation stores.
    """
    beside = {
        "at_images": images,
        "n": result["n"],
        "weights": result["checkpoint"]["weights"],
        "sampler": result["settings"].get("sample", {}),
    }
    return [
        {"metric": name, "leads": place == 0} | {key: score[key] for key in ("value", "interval", "floor")} | beside
        for place, (name, score) in enumerate(result["scores"].items())
    ]


def _attempts(store: Store, keys: Sequence[str], wrong: list[str]) -> list[Mapping[str, Any]]:
    starts = {int(m[1]): m[0] for m in (re.fullmatch(r"attempts/(\d+)/start\.json", key) for key in keys) if m}
    records = ((number, _parsed(store, key, json.loads, wrong)) for number, key in sorted(starts.items()))
    return [{"attempt": number} | record for number, record in records if isinstance(record, dict)]


def _versions(store: Store, key: str, wrong: list[str]) -> Mapping[str, str]:
    try:
        return Manifest.from_json(store.read(key), key).versions
    except (DataError, NotFound) as error:  # deleted meanwhile, or unreadable: the page names it
        wrong.append(error.message)
        return {}


def _lines(store: Store, key: str, wrong: list[str]) -> list[dict[str, Any]]:
    found, torn = read_lines(store, key)
    if torn:
        wrong.append(f"{key}: {torn} torn line{'s' if torn > 1 else ''} left out")
    return found


def _parsed(store: Store, key: str, parse: Any, wrong: list[str]) -> Any:
    """The content of a file; None if it is absent, or named in `wrong`."""
    try:
        return parse(store.read(key))
    except NotFound:
        return None
    except (ValueError, yaml.YAMLError) as error:
        wrong.append(f"{key}: {error}")
        return None
