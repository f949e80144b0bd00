from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffussm.config.schema import DataConfig, Source
from diffussm.data import images
from diffussm.errors import DataError
from tests.diffussm.data import sets


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sets.picture_folder(tmp_path_factory.mktemp("pictures") / "p", {"ant": 5, "bee": 12, "cow": 3})


def config(pattern: object, **keys: Any) -> DataConfig:
    return DataConfig(source=Source.tar, images=str(pattern), resolution_px=8, **keys)


def write(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(("form", "classes"), [("folder", "abc"), ("cls", "012"), ("json", "abc")])
def test_the_class_is_in_a_folder_a_cls_or_a_json_file(folder: Path, tmp_path: Path, form: str, classes: str) -> None:
    shards = sets.tar_shards(folder, tmp_path / "tars", form=form)
    source = images.open_source(config(shards))
    plain = images.open_source(DataConfig(source=Source.folder, images=str(folder), resolution_px=8))
    assert [name[0] for name in source.classes] == list(classes)
    assert [item.label for item in source] == [item.label for item in plain]
    assert source.items[7].name.startswith("train-001.tar/bee")
    for ours, theirs in zip(source, plain, strict=True):
        assert np.array_equal(source.load(ours), plain.load(theirs))


def test_a_brace_pattern_names_the_shards(folder: Path, tmp_path: Path) -> None:
    shards = sets.tar_shards(folder, tmp_path / "tars")
    assert len(images.open_source(config(f"{shards}/train-{{000..002}}.tar"))) == 20
    assert len(images.open_source(config(f"{shards}/train-*.tar", classes=["bee"]))) == 12
    with pytest.raises(DataError, match=r"train-003\.tar names no"):
        images.open_source(config(f"{shards}/train-{{000..003}}.tar"))


def test_a_json_key_can_be_named(folder: Path, tmp_path: Path) -> None:
    picture = next(folder.rglob("*.png")).read_bytes()
    write(tmp_path / "a.tar", {"1.json": b'{"kind": 7}', "1.png": picture, "2.png": picture, "2.json": b'{"kind": 3}'})
    source = images.open_source(config(tmp_path, label_column="kind"))
    assert source.classes == ["3", "7"]
    assert [item.label for item in source] == [1, 0]
    with pytest.raises(DataError, match=r"a\.tar/1\.png: has no class; allowed are a \.cls file"):
        images.open_source(config(tmp_path))


def test_cut_off_and_compressed_shards_are_refused(folder: Path, tmp_path: Path) -> None:
    shards = sets.tar_shards(folder, tmp_path / "tars")
    shard = shards / "train-001.tar"
    whole = shard.read_bytes()
    for content in (whole[:3000], whole[:100], b"no tar at all" * 100):
        shard.write_bytes(content)
        with pytest.raises(DataError, match=r"train-001\.tar is no whole, uncompressed tar"):
            images.open_source(config(shards))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        second = tar.getmembers()[1].offset
    for content in (whole[:second], whole[:second] + b"no header" * 500):
        shard.write_bytes(content)
        with pytest.raises(DataError, match="neither a header nor the end of the archive at byte"):
            images.open_source(config(shards))
    write(tmp_path / "packed.tar", {"a/1.png": b"x"}, "w:gz")
    with pytest.raises(DataError, match=r"packed\.tar is no whole, uncompressed tar"):
        images.open_source(config(tmp_path / "packed.tar"))
    write(tmp_path / "empty.tar", {"readme.txt": b"nothing"})
    with pytest.raises(DataError, match="hold no pictures"):
        images.open_source(config(tmp_path / "empty.tar"))


def test_a_mask_beside_a_picture_is_not_the_picture(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {"x/1.jpg": b"", "x/1.seg.png": b"", "x/2.seg.png": b"", "x/2.jpg": b""})
    source = images.open_source(config(tmp_path))
    assert [item.name for item in source] == ["a.tar/x/1.jpg", "a.tar/x/2.jpg"]


def test_a_shard_that_shrank_since_is_no_corrupt_picture(folder: Path, tmp_path: Path) -> None:
    shards = sets.tar_shards(folder, tmp_path / "tars")
    source = images.open_source(config(shards))
    shard = shards / "train-002.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(DataError, match="ends after") as caught:
        source.load(source.items[-1])
    assert not isinstance(caught.value, images.CorruptImageError)
