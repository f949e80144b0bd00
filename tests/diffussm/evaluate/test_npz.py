from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from diffussm.errors import DataError, StorageError
from diffussm.evaluate import npz


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)


STATISTICS = {"pool": (np.arange(3.0), np.eye(3)), "spatial": (np.arange(2.0), 2 * np.eye(2))}


def test_numpy_reads_what_is_written_under_adms_names(tmp_path: Path) -> None:
    path, images = tmp_path / "new" / "reference.npz", pictures(7)
    npz.write(path, images.shape, [images[:3], images[3:]], STATISTICS, "c0ffee")
    with np.load(path, allow_pickle=False) as archive:
        assert set(archive.files) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "extractor"}
        assert np.array_equal(archive["arr_0"], images)
        assert np.array_equal(archive["sigma_s"], 2 * np.eye(2))
    assert list(path.parent.iterdir()) == [path]


def test_what_numpy_writes_is_read_in_batches(tmp_path: Path) -> None:
    path, images = tmp_path / "adm.npz", pictures(7)
    np.savez(path, arr_0=images, mu=np.arange(3, dtype=np.float32), sigma=np.eye(3), mu_s=np.ones(2), sigma_s=np.eye(2))
    batches = list(npz.pictures(path, 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert np.array_equal(np.concatenate(batches), images)
    statistics, extractor = npz.statistics(path)
    assert extractor == ""
    assert statistics["pool"][0].dtype == np.float64
    assert np.array_equal(statistics["spatial"][0], np.ones(2))


def test_files_without_pictures_or_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=np.ones(3), sigma=np.eye(3))
    assert list(npz.pictures(tmp_path / "a.npz", 3)) == []
    assert set(npz.statistics(tmp_path / "a.npz")[0]) == {"pool"}
    npz.write(tmp_path / "b.npz", (2, 4, 6, 3), [pictures(2)], {}, "")
    assert npz.statistics(tmp_path / "b.npz") == ({}, "")


def test_pickles_and_broken_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "pickle.npz", mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(3))
    with pytest.raises(DataError, match="pickle"):
        npz.statistics(tmp_path / "pickle.npz")
    (tmp_path / "junk.npz").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"junk\.npz"):
        npz.statistics(tmp_path / "junk.npz")
    np.savez(tmp_path / "shape.npz", mu=np.ones(3), sigma=np.eye(2))
    with pytest.raises(DataError, match="shapes"):
        npz.statistics(tmp_path / "shape.npz")
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(DataError, match="uint8"):
        list(npz.pictures(tmp_path / "float.npz", 1))
    whole = tmp_path / "whole.npz"
    npz.write(whole, (2, 4, 6, 3), [pictures(2)], {}, "")
    with zipfile.ZipFile(whole) as archive:
        data = archive.read("arr_0.npy")
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("arr_0.npy", data[:-5])
    with pytest.raises(DataError, match="cut off"):
        list(npz.pictures(tmp_path / "cut.npz", 2))


def test_nothing_is_left_of_a_file_that_could_not_be_finished(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found 2 pictures, expected 3"):
        npz.write(tmp_path / "a.npz", (3, 4, 6, 3), [pictures(2)], {}, "")
    with pytest.raises(DataError, match="expected"):
        npz.write(tmp_path / "a.npz", (2, 4, 4, 3), [pictures(2)], {}, "")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        npz.write(tmp_path / "file" / "a.npz", (2, 4, 6, 3), [pictures(2)], {}, "")
