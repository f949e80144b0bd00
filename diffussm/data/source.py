"""What every source of pictures is: items in a fixed order, and a reader that opens any of them.

A source lists its pictures once, where the work is planned; each item says by itself where its bytes lie. So a unit of
items and the source's reader, both small, are all that a worker on another machine needs.
"""

from __future__ import annotations

import abc
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffussm.checkpoint.store import NotFound, Store, open_store
from diffussm.config.schema import DataConfig
from diffussm.data.picture import CorruptImageError, Decoded, Pixels, decode
from diffussm.errors import DataError
from diffussm.naming import is_remote

_NAMES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Where:
    """Where the bytes of a picture lie; what `first` and `second` are is up to the reader."""

    file: str
    """Path or URL."""
    first: int = 0
    second: int = -1


@dataclass(frozen=True, slots=True)
class Item:
    """One picture of a source: `id` is its position, `name` says where it comes from, `label` indexes `classes`."""

    id: int
    name: str
    label: int
    where: Where


@dataclass(frozen=True, slots=True)
class Entry:
    """A picture as a source finds it, before ids are given."""

    name: str
    label: int
    where: Where


class Reader(abc.ABC):
    """Opens the pictures of one kind of source. Small and picklable, and safe to use from several threads."""

    @abc.abstractmethod
    def open(self, items: Sequence[Item]) -> Callable[[Item], bytes]:
        """A function that gives the bytes of any one of `items`; what they share is read once, here.

        Both raise DataError or StorageError when a file is gone or cannot be read.
        """

    def decode(self, data: bytes, side_px: int, name: str) -> Decoded:
        """The picture in `data`; raises CorruptImageError."""
        return decode(data, side_px, name)


class FileReader(Reader):
    """Pictures that are a file each, or bytes [first, first + second) of a larger file (a tar)."""

    def open(self, items: Sequence[Item]) -> Callable[[Item], bytes]:
        """Nothing is shared: each call reads its own bytes."""
        return lambda item: read_bytes(item.where.file, item.where.first, item.where.second)


class ImageSource:
    """Labelled pictures in a fixed order.

    Attributes:
        classes: class names; a label is an index into them.
        resolution_px: side of the pictures that `load` returns.
        credit: line to be shown under pictures of this source; empty when none is due.
        reader: opens the items.
        groups_matter: whether neighbours in the source's order are much cheaper to read together.
    """

    def __init__(
        self,
        cfg: DataConfig,
        classes: Sequence[str],
        entries: Sequence[Entry],
        reader: Reader,
        *,
        credit: str = "",
        groups_matter: bool = False,
    ) -> None:
        """Take `entries`, cut to `cfg.limit`; raise DataError when a class has no picture."""
        if cfg.resolution_px < 1:
            raise DataError(f"data.resolution_px: found {cfg.resolution_px}; allowed are whole numbers from 1 on")
        self.classes, self.credit, self.reader = list(classes), credit, reader
        self.resolution_px = cfg.resolution_px
        self.groups_matter = groups_matter
        kept = (entries[position] for position in _first_in_turn([entry.label for entry in entries], cfg.limit))
        self.items = [Item(i, entry.name, entry.label, entry.where) for i, entry in enumerate(kept)]
        present = {item.label for item in self.items}
        empty = [name for label, name in enumerate(self.classes) if label not in present]
        if not self.classes or empty:
            found = f"no pictures of {listed(empty)}" if empty else "no classes"
            raise DataError(
                f"data.source={cfg.source.value}: found {found}; each class needs at least one picture",
                "name other classes in data.classes, add pictures, or raise data.limit",
            )

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def load(self, item: Item) -> Pixels:
        """The picture as (resolution_px, resolution_px, 3) uint8 RGB.

        Raises:
            CorruptImageError: it cannot be decoded.
            DataError: its file is gone or cannot be read.
        """
        return self.reader.decode(self.reader.open([item])(item), self.resolution_px, item.name).pixels

    def load_all(self, items: Sequence[Item]) -> Iterator[Pixels | CorruptImageError]:
        """The pictures of neighbouring items, in order; what cannot be decoded comes as its error."""
        get = self.reader.open(items)
        for item in items:
            try:
                yield self.reader.decode(get(item), self.resolution_px, item.name).pixels
            except CorruptImageError as error:
                yield error


def store_of(file: str) -> tuple[Store, str]:
    """The store that holds `file` and its key there. A bucket's client is shared: making one takes a while."""
    base, _, key = file.rpartition("/")
    if not is_remote(file):
        return open_store(base or ("/" if file.startswith("/") else ".")), key
    bucket = "/".join(file.split("/")[:3])
    return _bucket(bucket, os.environ.get("S3_ENDPOINT_URL", "")), file[len(bucket) + 1 :]


@functools.lru_cache(maxsize=8)
def _bucket(url: str, endpoint: str) -> Store:
    return open_store(url)


def read_bytes(file: str, start: int = 0, size: int = -1) -> bytes:
    """Bytes [start, start + size) of a local file or an object; all of them for size -1.

    Raises:
        DataError: it is not there, or ends early.
        StorageError: it cannot be read.
    """
    store, key = store_of(file)
    try:
        data = store.read(key) if size < 0 else store.read_range(key, start, size)
    except NotFound as error:
        raise DataError(f"{file}: cannot be read: it is gone", "check that the pictures are where they were") from error
    if 0 <= size != len(data):
        raise DataError(
            f"{file}: ends after {len(data)} of {size} bytes at {start}", "the file has changed: copy it anew"
        )
    return data


def label_map(available: Sequence[str], wanted: Sequence[str]) -> dict[int, int]:
    """Position in `available` -> label; the order of `wanted` gives the labels, empty takes all as they are."""
    if not wanted:
        return {i: i for i in range(len(available))}
    unknown = [name for name in wanted if name not in available]
    twice = sorted({name for name in wanted if wanted.count(name) > 1})
    if unknown or twice:
        problem = f"found {listed(unknown)}" if unknown else f"{listed(twice)} named twice"
        raise DataError(
            f"data.classes: {problem}; allowed are {listed(available)}", "take names of that list, each once"
        )
    return {available.index(name): label for label, name in enumerate(wanted)}


def from_labels(
    cfg: DataConfig,
    found: Sequence[tuple[str, str | int, Where]],
    reader: Reader,
    names: Sequence[str] = (),
    *,
    groups_matter: bool = False,
) -> ImageSource:
    """A source of (name, class, place) triples.

    Args:
        cfg: the data section.
        found: pictures in the source's order; the class is a name, or a number: where `names` are given their index,
            even if some of them read as numbers, as Hugging Face's do for folders called 0, 1, 10, 2.
        reader: opens them.
        names: all class names, if the source tells them; else the distinct classes, numbers by value, in order.
        groups_matter: see ImageSource.

    Raises:
        DataError: a number that is no index, or as `label_map` and ImageSource.
    """
    numbers_are_indices = bool(names)
    if not names:
        names = [str(value) for value in sorted({value for _, value, _ in found}, key=_by_value)]
    position = {name: i for i, name in enumerate(names)}
    wanted = label_map(names, cfg.classes)
    entries = []
    for name, value, where in found:
        place = value if numbers_are_indices and isinstance(value, int) else position.get(str(value), value)
        if not isinstance(place, int) or not 0 <= place < len(names):
            raise DataError(
                f"{name}: found class {value!r}; allowed are {listed(names)}", "give each picture one of the classes"
            )
        if place in wanted:
            entries.append(Entry(name, wanted[place], where))
    return ImageSource(cfg, cfg.classes or names, entries, reader, groups_matter=groups_matter)


def local_folder(url: str) -> Path:
    """A local place as a path."""
    return Path(url.removeprefix("file://")).expanduser()


def listed(names: Sequence[str]) -> str:
    """Names for an error message, the first twenty of them."""
    shown = ", ".join(repr(name) for name in names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _by_value(value: str | int) -> tuple[bool, int, str]:
    number = str(value).lstrip("-").isdecimal()
    return (not number, int(value) if number else 0, str(value))


def _first_in_turn(labels: Sequence[int], limit: int) -> list[int]:
    """Positions of the first `limit` entries when classes take turns (all for 0), in the entries' own order."""
    if limit < 0:
        raise DataError(f"data.limit: found {limit}; allowed are 0 (all) and positive numbers")
    if limit == 0:
        return list(range(len(labels)))
    seen: dict[int, int] = {}
    turns = []
    for position, label in enumerate(labels):
        turns.append((seen.setdefault(label, 0), label, position))
        seen[label] += 1
    return sorted(position for _, _, position in sorted(turns)[:limit])
