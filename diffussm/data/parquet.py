"""Parquet files with the pictures' bytes, as Hugging Face's `datasets` writes them: the door to pyarrow."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffussm.config.schema import DataConfig
from diffussm.data.labels import LABEL_KEYS
from diffussm.data.ranged import expand, open_file
from diffussm.data.source import ImageSource, Item, Reader, Where, from_labels, listed
from diffussm.errors import DataError

_BUFFER_BYTES = 1 << 16
_IMAGE_KEYS = ("image", "img", "jpg", "png", "picture")


class ParquetReader(Reader):
    """Rows of Parquet files. `first` of an item's place is its row group, `second` the row in it."""

    def __init__(self, column: str) -> None:
        self.column = column

    def open(self, items: Sequence[Item]) -> Callable[[Item], bytes]:
        """Read each row group that holds some of `items` once, and keep only their bytes."""
        rows: dict[tuple[str, int], list[int]] = {}
        for item in items:
            rows.setdefault((item.where.file, item.where.first), []).append(item.where.second)
        kept: dict[Where, bytes] = {}
        for file in sorted({file for file, _ in rows}):
            with _opened(file) as table:
                for group in sorted(group for f, group in rows if f == file):
                    column = table.read_row_group(group, columns=[self.column]).column(0)
                    for row in rows[file, group]:
                        kept[Where(file, group, row)] = _bytes(column[row].as_py())
        return lambda item: kept[item.where]


def open_parquet(cfg: DataConfig) -> ImageSource:
    """List the rows of the files that `cfg.images` names (see `ranged.expand`).

    The picture's column is `cfg.image_column`, else one with a usual name that holds bytes or {bytes, path}; the
    class is `cfg.label_column` or one with a usual name. Class names come from Hugging Face's schema if it is there.

    Raises:
        DataError: no such column, a row without a class, a file that is no Parquet, or as `source.from_labels`.
        StorageError: a file cannot be read.
    """
    files = expand(cfg.images, ".parquet")
    names: list[str] = []
    columns: tuple[str, str] | None = None
    found: list[tuple[str, str | int, Where]] = []
    for file in files:
        with _opened(file) as table:
            schema = table.schema_arrow
            image, label = _columns(schema, cfg, file)
            if columns not in (None, (image, label)):
                raise DataError(f"{file}: has other columns than {files[0]}", "name files of one data set")
            columns = (image, label)
            names = names or _class_names(schema, label)
            short = PurePosixPath(file).name
            row = 0
            for group in range(table.num_row_groups):
                for within, value in enumerate(table.read_row_group(group, columns=[label]).column(0).to_pylist()):
                    if value is None or (isinstance(value, int) and value < 0):
                        raise DataError(
                            f"{short}#{row}: has no class ({label} is {value})", "use a split that is labelled"
                        )
                    found.append((f"{short}#{row}", value, Where(file, group, within)))
                    row += 1
    if columns is None or not found:
        raise DataError(f"data.images: the {len(files)} files of {cfg.images} hold no rows", "name other files")
    return from_labels(cfg, found, ParquetReader(columns[0]), names, groups_matter=True)


class _opened:
    """A Parquet file of a path or URL; what pyarrow raises becomes a DataError."""

    def __init__(self, file: str) -> None:
        self._file = file

    def __enter__(self) -> pq.ParquetFile:
        self._stream = open_file(self._file, _BUFFER_BYTES)
        try:
            return pq.ParquetFile(self._stream)
        except BaseException as error:
            self.__exit__(type(error), error)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any = None) -> None:
        self._stream.close()
        if isinstance(error, pa.ArrowException | OSError):
            raise DataError(f"{self._file}: is no whole Parquet file ({error})", "fetch it again") from error


def _columns(schema: pa.Schema, cfg: DataConfig, file: str) -> tuple[str, str]:
    """Names of the picture's and the class's column."""
    images = [field.name for field in schema if _holds_bytes(field.type)]
    usual = [name for name in _IMAGE_KEYS if name in images] or images
    if cfg.image_column:
        usual = [cfg.image_column] if cfg.image_column in images else []
    labels = [name for name in ([cfg.label_column] if cfg.label_column else LABEL_KEYS) if name in schema.names]
    for key, wanted, allowed in (
        ("data.image_column", usual, f"a column of bytes or {{bytes, path}}: {listed(images) or 'none here'}"),
        ("data.label_column", labels, f"a column of {listed(schema.names)}"),
    ):
        if not wanted:
            value = cfg.image_column if key == "data.image_column" else cfg.label_column
            raise DataError(f"{key}: found {value!r} for {file}; allowed: {allowed}", f"set {key}")
    return usual[0], labels[0]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return "bytes" in names
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(schema: pa.Schema, label: str) -> list[str]:
    """Names of a ClassLabel feature in the schema's `huggingface` metadata; empty if there is none."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        return [str(name) for name in info["info"]["features"][label]["names"]]
    except (KeyError, ValueError, TypeError):
        return []


def _bytes(value: Any) -> bytes:
    """A picture's bytes; empty, which decoding names, when the row has none or only a path."""
    found = value.get("bytes") if isinstance(value, dict) else value
    return found or b""
