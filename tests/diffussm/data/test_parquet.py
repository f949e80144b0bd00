from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffussm.config.schema import DataConfig, Source
from diffussm.data import images
from diffussm.data.units import storage_order
from diffussm.errors import DataError
from tests.diffussm.data import sets


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sets.picture_folder(tmp_path_factory.mktemp("pictures") / "p", {"ant": 9, "bee": 20, "cow": 3})


def config(pattern: object, **keys: Any) -> DataConfig:
    return DataConfig(source=Source.parquet, images=str(pattern), resolution_px=8, **keys)


def test_hugging_faces_layout_gives_the_folders_pictures_and_names(folder: Path, tmp_path: Path) -> None:
    source = images.open_source(config(sets.parquet_files(folder, tmp_path / "hf")))
    plain = images.open_source(DataConfig(source=Source.folder, images=str(folder), resolution_px=8))
    assert source.classes == plain.classes == ["ant", "bee", "cow"]
    assert source.items[25].name == "train-00001.parquet#5"
    assert [item.label for item in source] == [item.label for item in plain]
    for ours, theirs in zip(source.load_all(source.items), plain.load_all(plain.items), strict=True):
        assert np.array_equal(ours, theirs)  # type: ignore[arg-type]
    assert np.array_equal(source.load(source.items[25]), plain.load(plain.items[25]))


def test_a_unit_reads_few_row_groups_and_mixes_them(folder: Path, tmp_path: Path) -> None:
    source = images.open_source(config(sets.parquet_files(folder, tmp_path / "hf")))
    order = storage_order(source.items, source.groups_matter, 12)
    assert sorted(order) == list(range(32))
    first = [source.items[i].where for i in order[:12]]
    groups = [(where.file, where.first) for where in first]
    assert len(set(groups)) <= 3
    assert groups != sorted(groups)
    assert order == storage_order(source.items, True, 12)


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_columns_are_found_or_named(folder: Path, tmp_path: Path) -> None:
    picture = next(folder.rglob("*.png")).read_bytes()
    path = write(tmp_path / "a.parquet", raw=[picture] * 3, other=[b"", b"", b""], kind=["x", "y", "x"])
    source = images.open_source(config(path, image_column="raw", label_column="kind"))
    assert source.classes == ["x", "y"]
    assert [item.label for item in source] == [0, 1, 0]
    for keys, message in [
        ({"label_column": "none"}, r"data.label_column: found 'none'"),
        ({"image_column": "kind", "label_column": "kind"}, r"data.image_column: found 'kind'.*'raw', 'other'"),
        ({}, r"data.label_column: found ''.*'raw', 'other', 'kind'"),
    ]:
        with pytest.raises(DataError, match=message):
            images.open_source(config(path, **keys))


def test_rows_without_class_or_bytes(folder: Path, tmp_path: Path) -> None:
    picture = next(folder.rglob("*.png")).read_bytes()
    path = write(tmp_path / "a.parquet", image=[picture, None, b"no"], label=[0, 1, 2])
    source = images.open_source(config(path))
    kinds = [getattr(loaded, "kind", "fine") for loaded in source.load_all(source.items)]
    assert kinds == ["fine", "empty", "no-image"]
    write(path, image=[picture], label=[-1])
    with pytest.raises(DataError, match=r"a\.parquet#0: has no class \(label is -1\)"):
        images.open_source(config(path))
    write(path, image=pa.array([], pa.binary()), label=pa.array([], pa.int64()))
    with pytest.raises(DataError, match="hold no rows"):
        images.open_source(config(path))


def test_a_number_is_the_index_of_a_name_even_if_names_are_numbers(folder: Path, tmp_path: Path) -> None:
    picture = next(folder.rglob("*.png")).read_bytes()
    feature = {"label": {"names": ["0", "1", "10", "2"], "_type": "ClassLabel"}}
    table = pa.table({"image": [picture] * 4, "label": [0, 1, 2, 3]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
    pq.write_table(table, tmp_path / "a.parquet")
    source = images.open_source(config(tmp_path / "a.parquet"))
    assert source.classes == ["0", "1", "10", "2"]
    assert [item.label for item in source] == [0, 1, 2, 3]
    chosen = images.open_source(config(tmp_path / "a.parquet", classes=["10"]))
    assert [item.name for item in chosen] == ["a.parquet#2"]


def test_broken_and_unlike_files_are_refused(folder: Path, tmp_path: Path) -> None:
    files = sets.parquet_files(folder, tmp_path / "hf")
    second = files / "train-00001.parquet"
    whole = second.read_bytes()
    second.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"train-00001\.parquet: is no whole Parquet file"):
        images.open_source(config(files))
    write(second, picture=[b"x"], label=[1])
    with pytest.raises(DataError, match="other columns"):
        images.open_source(config(files))
