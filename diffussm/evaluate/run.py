"""From the features in the store to the result: scores with intervals and floors, and everything to judge them by."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffussm
from diffussm.checkpoint.store import Store
from diffussm.errors import DataError
from diffussm.evaluate.extractors import Extractor, Features
from diffussm.evaluate.reference import Reference
from diffussm.evaluate.scores import KERNEL_IMAGES, NEIGHBOUR, Tally

VERSION = 2
"""Of the JSON; 1 had one distance alone."""


@dataclass(frozen=True)
class Result:
    """Scores and everything that is needed to judge them. Equal on any number of workers, `times` apart."""

    scores: Mapping[str, Mapping[str, Any]]
    """Name -> value, interval (95 %, or null) and floor (what real pictures score, or null)."""
    n: int
    """Generated pictures."""
    extractor: Mapping[str, Any]
    """Name and digest of the feature network and its preprocessing."""
    reference: Mapping[str, Any]
    """Digest, source, number of real pictures, and of those whose features are kept."""
    floor: Mapping[str, int] | None
    """Counts on the two sides of the floor."""
    checkpoint: Mapping[str, Any]
    """Images seen, which weights, their digest."""
    settings: Mapping[str, Any]
    """Every setting that decides the pictures and the scores."""
    code: Mapping[str, str]
    """Version, and digest of the package's source."""
    times: Mapping[str, Any] = field(default_factory=dict)
    """Seconds and rates of this evaluation; not part of what two evaluations must agree in."""
    version: int = VERSION

    @property
    def first(self) -> str:
        """Name of the score that stands for all: the Frechet distance."""
        return next(iter(self.scores))

    def line(self) -> str:
        """The scores in one line; the first never without its count, interval and floor."""
        score = self.scores[self.first]
        said = [f"n = {self.n}"]
        if score["interval"]:
            said.append("95 %: {:.1f} to {:.1f}".format(*score["interval"]))
        if self.floor and score["floor"] is not None:
            said.append(f"real against real at n = {self.floor['n']}: {score['floor']:.1f}")
        others = ", ".join(f"{name} {s['value']:.4g}" for name, s in self.scores.items() if name != self.first)
        return f"{self.first} = {score['value']:.1f} ({'; '.join(said)})" + (f"; {others}" if others else "")

    def to_json(self) -> str:
        """All fields as JSON. Raises ValueError if a number is not finite, TypeError if a setting is not JSON."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: bytes | str, where: str) -> Result:
        """Read what `to_json` wrote. Raises DataError if it is something else or of another version."""
        try:
            found = cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise DataError(f"{where}: is no result of an evaluation ({error})", "delete it") from error
        if found.version != VERSION:
            raise DataError(f"{where}: found version {found.version}, read is {VERSION}", "evaluate again")
        return found

    def save(self, store: Store, key: str) -> None:
        """Write the JSON to `key`. Raises StorageError."""
        store.write(key, (self.to_json() + "\n").encode())

    def record(self) -> dict[str, Any]:
        """One line for journals and W&B: images and each score with its interval."""
        flat: dict[str, Any] = {"images": self.checkpoint["images"]}
        for name, score in self.scores.items():
            flat[f"score/{name}"] = score["value"]
            if score["interval"]:
                flat[f"score/{name}/low"], flat[f"score/{name}/high"] = score["interval"]
            if score["floor"] is not None:
                flat[f"score/{name}/floor"] = score["floor"]
        return flat


def judge(
    features: Iterable[Features],
    n: int,
    reference: Reference,
    extractor: Extractor,
    *,
    checkpoint: Mapping[str, Any],
    settings: Mapping[str, Any],
    device: str = "cpu",
) -> Result:
    """Score generated features against a reference.

    Args:
        features: of all pictures in the order of their indices.
        n: how many pictures those are.
        reference: the real side, made with the same extractor.
        extractor: feature network.
        checkpoint: images seen, which weights, their digest.
        settings: what else decided the pictures.
        device: where distances of precision and recall are computed.

    Raises:
        DataError: fewer than 2 pictures, or another number than n.
        ValueError: the reference was made with another extractor.
    """
    if reference.extractor != extractor.digest:
        raise ValueError(f"reference: made with extractor {reference.extractor}; this one is {extractor.digest}")
    tally = Tally(extractor.taps, n)
    for part in features:
        tally.add(part)
    floor = reference.floor
    scores = {}
    for kind, score in tally.scores(reference.side, device).items():
        known = floor.values.get(kind) if floor else None
        scores[extractor.metric_names[kind]] = {"value": score.value, "interval": score.interval, "floor": known}
    return Result(
        scores=scores,
        n=n,
        extractor={"name": extractor.name, "digest": extractor.digest, "taps": dict(extractor.taps)},
        reference={
            "digest": reference.digest,
            "source": reference.source,
            "n": reference.n,
            "features": len(reference.side.features),
        },
        floor={"n": floor.n, "rest": floor.rest} if floor else None,
        checkpoint=checkpoint,
        settings=dict(settings) | {"neighbour": NEIGHBOUR, "kernel_images": min(n, KERNEL_IMAGES)},
        code=code(),
    )


@functools.cache
def code() -> Mapping[str, str]:
    """Version, and a digest over the package's source: results of one digest were computed alike."""
    root = Path(diffussm.__file__).parent
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return {"version": diffussm.__version__, "digest": total.hexdigest()[:16]}
