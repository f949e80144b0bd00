"""ADM's files: pictures as `arr_0`, statistics as `mu`, `sigma`, `mu_s`, `sigma_s`; read and written without pickle.

What is written here can be given to ADM's own script as either side. Pictures are streamed: 50,000 of 256 px are 10 GB.
"""

from __future__ import annotations

import secrets
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from diffussm.errors import DataError, StorageError
from diffussm.evaluate.extractors import POOL, SPATIAL

PICTURES = "arr_0"
STATISTICS = {POOL: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
EXTRACTOR = "extractor"
"""Digest of the extractor of our own files' statistics; ADM's have none and are Inception's."""

Statistics = Mapping[str, tuple[np.ndarray, np.ndarray]]


def write(
    path: Path, shape: tuple[int, int, int, int], batches: Iterable[np.ndarray], statistics: Statistics, extractor: str
) -> None:
    """Write pictures and statistics; the file appears whole or not at all.

    Args:
        path: where.
        shape: (N, H, W, 3).
        batches: uint8 (B, H, W, 3), N pictures in all.
        statistics: tap -> mean and covariance; may be empty.
        extractor: digest of their extractor.

    Raises:
        DataError: `batches` does not yield N pictures of that size.
        StorageError: the file cannot be written.
    """
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}", "name a place that can be written") from error
    try:
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open(f"{PICTURES}.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                seen = 0
                for batch in batches:
                    if batch.shape[1:] != shape[1:] or batch.dtype != np.uint8:
                        raise DataError(f"{path}: found pictures {batch.shape} of {batch.dtype}, expected {shape}")
                    seen += len(batch)
                    file.write(np.ascontiguousarray(batch).data)
            if seen != shape[0]:
                raise DataError(f"{path}: found {seen} pictures, expected {shape[0]}")
            for tap, values in statistics.items():
                for name, value in zip(STATISTICS[tap], values, strict=True):
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, value, allow_pickle=False)
            if statistics:
                with archive.open(f"{EXTRACTOR}.npy", "w") as file:
                    np.lib.format.write_array(file, np.array(extractor), allow_pickle=False)
        beside.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}", "name a place that can be written") from error
    finally:
        beside.unlink(missing_ok=True)


def statistics(path: Path) -> tuple[Statistics, str]:
    """Mean and covariance of each tap that the file has, in float64, and the extractor's digest if it says one.

    Raises:
        DataError: not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {
                tap: tuple(np.asarray(archive[name], np.float64) for name in names)
                for tap, names in STATISTICS.items()
                if set(names) <= set(archive.files)
            }
            extractor = str(archive[EXTRACTOR]) if EXTRACTOR in archive.files else ""
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path}: is no .npz file that can be read ({error})", "name another file") from error
    for tap, (mean, cov) in found.items():
        if mean.ndim != 1 or cov.shape != 2 * mean.shape:
            shapes = f"{STATISTICS[tap]} have shapes {mean.shape}, {cov.shape}"
            raise DataError(f"{path}: {shapes}; allowed are (d,), (d, d)")
    return found, extractor  # type: ignore[return-value]


def pictures(path: Path, size: int) -> Iterator[np.ndarray]:
    """The file's pictures in batches of at most `size`: uint8 (B, H, W, 3); nothing if it has none.

    Raises:
        DataError: they are not uint8 (N, H, W, 3), or the file is cut off.
    """
    with zipfile.ZipFile(path) as archive:
        if f"{PICTURES}.npy" not in archive.namelist():
            return
        with archive.open(f"{PICTURES}.npy") as file:
            try:
                version = np.lib.format.read_magic(file)
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, fortran, dtype = read[version](file)
            except (ValueError, KeyError) as error:
                raise DataError(f"{path}: {PICTURES} has no header that can be read ({error})") from error
            if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
                raise DataError(f"{path}: {PICTURES} is {dtype} {shape}; allowed is uint8 (N, H, W, 3)")
            for start in range(0, shape[0], size):
                wanted = (min(size, shape[0] - start), *shape[1:])
                data = file.read(int(np.prod(wanted)))
                if len(data) != np.prod(wanted):
                    raise DataError(f"{path}: {PICTURES} is cut off", "fetch the file again")
                yield np.frombuffer(data, np.uint8).reshape(wanted)
