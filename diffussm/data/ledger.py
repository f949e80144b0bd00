"""The ledger of making latents: which units are done, with the digests of their shards, in the store beside them.

`ledger/plan.json` is created by the first start. `ledger/<unit>.json` is created after the unit's last shard; without
it the unit is not done. A finished set's index and passport are made of the ledger alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from diffussm.checkpoint.store import AlreadyExists, NotFound, Store
from diffussm.data.passport import Skipped
from diffussm.data.shards import Shard
from diffussm.data.units import Plan
from diffussm.errors import DataError

PLAN = "ledger/plan.json"
FORMAT = "diffussm-ledger-1"
_OURS = re.compile(r"ledger/(plan|\d{6,})\.json|shard\.[\d.]+\.mds|index\.json|\.probe-\w+")


@dataclass
class Record:
    """What one unit gave. Nothing in it depends on who made it."""

    plan: str
    """Digest of the plan."""
    unit: int
    shards: list[Shard] = field(default_factory=list)
    class_counts: dict[int, int] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    converted: dict[str, int] = field(default_factory=dict)
    """Pictures that were converted, by word (see `picture.oddities`)."""
    elements: int = 0
    """Latent elements, and over them the sum of"""
    total: float = 0.0
    """means and of"""
    squares: float = 0.0
    """mean^2 + std^2."""

    def to_json(self) -> bytes:
        """The record as JSON."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1, sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes, where: str) -> Record:
        """Read what `to_json` wrote; raises DataError naming `where` when it is no record."""
        try:
            values: dict[str, Any] = json.loads(data)
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            values["class_counts"] = {int(label): count for label, count in values["class_counts"].items()}
            values["skipped"] = [Skipped(**entry) for entry in values["skipped"]]
            return Record(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where}: is no record of a unit ({error!r})", "remove it: the unit is made again"
            ) from error


class Ledger:
    """The ledger of one plan in one store."""

    def __init__(self, store: Store, plan: Plan) -> None:
        self.store, self.plan = store, plan

    def begin(self) -> None:
        """Claim the place for this plan, or find that it is claimed for it already.

        Raises:
            DataError: it holds other things, or unfinished latents of another plan; the message says what differs.
            StorageError: it cannot be written.
        """
        strange = [key for key in self.store.keys("") if not _OURS.fullmatch(key)]
        if strange:
            raise DataError(
                f"data.latents: found {self.store.url}, which holds other things than latents ({strange[0]}); "
                "nothing there is overwritten",
                "choose a folder that does not exist yet",
            )
        mine = {"format": FORMAT, "digest": self.plan.digest, "images": self.plan.images} | self.plan.settings
        try:
            self.store.write(PLAN, json.dumps(mine, indent=1, sort_keys=True).encode(), create=True)
        except AlreadyExists:
            theirs = json.loads(self.store.read(PLAN))
            differ = [f"{k}: {theirs.get(k)!r}, now {v!r}" for k, v in mine.items() if theirs.get(k) != v]
            if differ:
                only_digest = [text for text in differ if not text.startswith("digest")]
                raise DataError(
                    f"data.latents: {self.store.url} holds unfinished latents of another plan "
                    f"({'; '.join(only_digest) or 'the pictures have changed'})",
                    f"set the old values, or remove {self.store.url} and start again",
                ) from None

    def done(self, warn: Callable[[str], None]) -> dict[int, Record]:
        """Records of the units that are done; one whose shard is gone is taken back, with a warning."""
        there = set(self.store.keys())
        found = {}
        for unit in self.plan.units:
            if key(unit.number) not in there:
                continue
            record = self.read(unit.number)
            gone = [name for shard in record.shards if (name := shard["raw_data"]["basename"]) not in there]
            if gone:
                warn(f"{self.store.url}: {', '.join(gone)} of a finished unit is gone; the unit is made again")
                self.store.delete(key(unit.number))
            else:
                found[unit.number] = record
        return found

    def read(self, unit: int) -> Record:
        """The record of a unit. Raises NotFound when it is not done, DataError when it is malformed."""
        return Record.from_json(self.store.read(key(unit)), f"{self.store.url}/{key(unit)}")

    def find(self, unit: int) -> Record | None:
        """The record of a unit, None when it is not done."""
        try:
            return self.read(unit)
        except NotFound:
            return None

    def add(self, record: Record) -> Record:
        """Mark a unit as done after its last shard; if another worker was faster, its record is the one that counts."""
        try:
            self.store.write(key(record.unit), record.to_json(), create=True)
        except AlreadyExists:
            return self.read(record.unit)
        return record

    def take_back(self, records: Iterable[Record]) -> None:
        """Have units made again by the next start."""
        for record in records:
            self.store.delete(key(record.unit))

    def sweep(self, records: Iterable[Record]) -> None:
        """Delete shards that no record names: an older, unfinished set had them."""
        named = {shard["raw_data"]["basename"] for record in records for shard in record.shards}
        for name in [k for k in self.store.keys("shard.") if k not in named]:
            self.store.delete(name)


def key(unit: int) -> str:
    """Key of a unit's record."""
    return f"ledger/{unit:06d}.json"


def summed(records: Iterable[Record], classes: int) -> tuple[list[int], Counter[str], list[Skipped], float, float]:
    """Class counts, converted pictures, skipped ones, mean and deviation over all records, in their order."""
    counts, converted, skipped = [0] * classes, Counter[str](), []
    elements, total, squares = 0, 0.0, 0.0
    for record in records:
        for label, count in record.class_counts.items():
            counts[label] += count
        converted.update(record.converted)
        skipped += record.skipped
        elements, total, squares = elements + record.elements, total + record.total, squares + record.squares
    mean = total / max(elements, 1)
    return counts, converted, skipped, mean, max(0.0, squares / max(elements, 1) - mean**2) ** 0.5
