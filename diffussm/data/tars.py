"""Tar shards in WebDataset's layout: files of one sample share their name up to the first dot.

WebDataset's own reader streams shards from front to back. Units of work need any sample of any shard, so each shard's
table of contents is read once, and a picture is then read as a range of bytes.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from diffussm.config.schema import DataConfig
from diffussm.data.labels import as_label, pick
from diffussm.data.picture import SUFFIXES
from diffussm.data.ranged import expand, open_file
from diffussm.data.source import FileReader, ImageSource, Where, from_labels
from diffussm.errors import DataError, DiffuSSMError

_THREADS = 8
_BUFFER_BYTES = 1 << 20
_LARGEST_LABEL_BYTES = 1 << 20


@dataclass
class _Sample:
    """What one name up to the first dot holds."""

    name: str = ""
    where: Where | None = None
    label: str | int | None = None


def open_tars(cfg: DataConfig) -> ImageSource:
    """Read the tables of contents of the shards that `cfg.images` names (see `ranged.expand`).

    The class of a sample is its `.cls` file (a number or a name), else the `label` of its `.json` file (or
    `cfg.label_column`), else the folder it lies in within the shard.

    Raises:
        DataError: a shard is missing, compressed or cut off, a sample has no class, or as `source.from_labels`.
        StorageError: a shard cannot be read.
    """
    shards = expand(cfg.images, ".tar")
    with ThreadPoolExecutor(_THREADS) as pool:
        found = [
            entry for part in pool.map(lambda shard: list(_samples(shard, cfg.label_column)), shards) for entry in part
        ]
    if not found:
        raise DataError(f"data.images: the {len(shards)} shards of {cfg.images} hold no pictures", "name other shards")
    return from_labels(cfg, found, FileReader())


def _samples(shard: str, column: str) -> Iterator[tuple[str, str | int, Where]]:
    """(name, class, place) of each picture of one shard, in the shard's order."""
    short = PurePosixPath(shard).name
    samples: dict[str, _Sample] = {}
    try:
        with open_file(shard, _BUFFER_BYTES) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            size = file.seek(0, 2)
            file.seek(0)
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} ends beyond the file")
                path = PurePosixPath(member.name)
                stem, _, ending = path.name.partition(".")
                if not stem:
                    continue  # a hidden file
                sample = samples.setdefault(str(path.parent / stem), _Sample())
                if f".{ending}".lower().endswith(SUFFIXES):
                    if sample.where is not None and "." in ending:
                        continue  # a.seg.png beside a.jpg is not the picture
                    sample.name = f"{short}/{member.name}"
                    sample.where = Where(shard, member.offset_data, member.size)
                elif ending in ("cls", "json") and member.size <= _LARGEST_LABEL_BYTES:
                    sample.label = _label(tar, member, ending, column, sample.label)
            # tarfile ends in silence at a header that is broken or not there.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"neither a header nor the end of the archive at byte {tar.offset}")
    except (tarfile.TarError, EOFError, ValueError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.images: {shard} is no whole, uncompressed tar with labels of text ({error})",
            "fetch it again; unpack .tar.gz to .tar, since samples are read by their offset",
        ) from error
    for key, sample in samples.items():
        if sample.where is None:
            continue
        folder = PurePosixPath(key).parent.name
        label = sample.label if sample.label is not None else folder or None
        if label is None:
            raise DataError(
                f"{sample.name}: has no class; allowed are a .cls file, a .json file with "
                f"{column or 'label'!r}, or a folder within the shard",
                "add one of them to each sample; data.label_column names the key in .json",
            )
        yield sample.name, label, sample.where


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str, column: str, known: Any) -> str | int | None:
    """The class in a `.cls` or `.json` member; `.cls` wins over `.json`, which may say other things too."""
    if ending == "json" and known is not None:
        return known  # type: ignore[no-any-return]
    stream = tar.extractfile(member)
    if stream is None:
        raise DiffuSSMError(f"{member.name}: a file without content")  # cannot be: isfile() was true
    text = stream.read().decode()
    if ending == "cls":
        return as_label(text)
    content = json.loads(text)
    found = pick(content, column) if isinstance(content, dict) else None
    return found if found is not None else known
