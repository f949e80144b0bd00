"""What a checkpoint consists of: pure data, read and written as JSON. Without a manifest no checkpoint exists."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from diffussm.errors import DataError

FORMAT = "diffussm-checkpoint"
VERSION = 2
"""Raised when an older reader would read wrongly; what it may leave unread needs no new number."""
MANIFEST = "manifest.json"


class NewerFormat(DataError):
    """The checkpoint was written by a newer version: it is whole, only this version cannot read it."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of one flattened parameter, for each kind of state, in one file."""

    name: str
    start: int
    numel: int


@dataclass(frozen=True)
class File:
    """One rank's safetensors file. Its tensors are 1-D, named `<kind>/<parameter>`."""

    name: str
    size: int
    xxh3: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Counters:
    """Where the training stands. Images are the clock; (epoch, images_in_epoch) is the data cursor."""

    images: int
    step: int
    epoch: int
    images_in_epoch: int
    adam_steps: int
    """Steps AdamW has taken; skipped ones do not count."""
    nonfinite_steps: int
    """Steps that were skipped because something was not finite."""

    def after_step(self, global_batch: int, epoch: int, skipped: bool) -> Counters:
        """The counters after one more step, on a batch of `epoch`."""
        return Counters(
            images=self.images + global_batch,
            step=self.step + 1,
            epoch=epoch,
            images_in_epoch=global_batch + (self.images_in_epoch if epoch == self.epoch else 0),
            adam_steps=self.adam_steps + int(not skipped),
            nonfinite_steps=self.nonfinite_steps + int(skipped),
        )


@dataclass(frozen=True)
class Manifest:
    """Everything needed to find and verify the state of a run after `counters.images` images."""

    counters: Counters
    attempt: int
    world_size: int
    zero_stage: int
    config_digest: str
    kinds: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    files: tuple[File, ...]
    versions: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """`kind/parameter` -> digest of the whole tensor, the sum of its slices' (see digest.slice_sum)."""
    created: float = 0.0
    """Seconds since 1970."""
    permanent: bool = False
    """A milestone, which is never deleted."""
    run_id: str = ""
    """Tells this run from an earlier one of the same name."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """`kind/parameter` -> `F32`; `BF16` or `F16` in snapshots of averages."""

    def to_json(self) -> bytes:
        """The manifest as indented JSON."""
        return json.dumps({"format": FORMAT, "version": VERSION} | asdict(self), indent=1).encode()

    @staticmethod
    def from_json(data: bytes, where: str) -> Manifest:
        """Parse a manifest.

        Raises:
            NewerFormat: a newer version wrote it.
            DataError: it is not JSON, of another format, or incomplete; `where` names it.
        """
        try:
            raw: dict[str, Any] = json.loads(data)
            if raw["format"] != FORMAT:
                raise DataError(f"{where}: format {raw['format']!r}, this version reads {FORMAT!r}")
            if raw["version"] > VERSION:
                raise NewerFormat(
                    f"{where}: version {raw['version']} of the format, this DiffuSSM reads up to version {VERSION}",
                    "install the DiffuSSM that wrote it, or a newer one; or move the checkpoint away to do without it",
                )
            files = tuple(
                File(f["name"], f["size"], f["xxh3"], tuple(Piece(**piece) for piece in f["pieces"]))
                for f in raw["files"]
            )
            return Manifest(
                counters=Counters(**raw["counters"]),
                attempt=raw["attempt"],
                world_size=raw["world_size"],
                zero_stage=raw["zero_stage"],
                config_digest=raw["config_digest"],
                kinds=tuple(raw["kinds"]),
                shapes={name: tuple(shape) for name, shape in raw["shapes"].items()},
                files=files,
                versions=raw["versions"],
                digests=raw["digests"],
                created=raw["created"],
                permanent=raw["permanent"],
                run_id=raw["run_id"],
                dtypes=raw["dtypes"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{where}: not a checkpoint manifest ({error!r})", "the checkpoint cannot be used"
            ) from error


@dataclass(frozen=True)
class Copy:
    """Copy elements [source, source + numel) of a file's piece to [target, target + numel) of the wanted slice."""

    file: str
    source: int
    target: int
    numel: int


class Index:
    """Finds, for any range of any parameter, the files that hold it: this is what makes world sizes free."""

    def __init__(self, files: Iterable[File]) -> None:
        self._pieces: dict[str, list[tuple[Piece, str]]] = {}
        for file in files:
            for piece in file.pieces:
                self._pieces.setdefault(piece.name, []).append((piece, file.name))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda entry: entry[0].start)

    def copies(self, name: str, start: int, numel: int) -> list[Copy]:
        """The copies that fill elements [start, start + numel) of parameter `name`, in order.

        Raises:
            DataError: some element is in no file or in two.
        """
        found, position, stop = [], start, start + numel
        for piece, file in self._pieces.get(name, []):
            low, high = max(start, piece.start), min(stop, piece.start + piece.numel)
            if low >= high:
                continue
            if low != position:
                break
            found.append(Copy(file, low - piece.start, low - start, high - low))
            position = high
        if position != stop:
            raise DataError(
                f"checkpoint: elements {position}..{stop} of {name} are held by no file, or by two",
                "use an older checkpoint",
            )
        return found
