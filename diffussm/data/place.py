"""Where a set of latents lies: a folder or a bucket, its small files, and the words for a store that fails."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from diffussm.data.mds import CloudDownloader
from diffussm.data.passport import FILE, Passport
from diffussm.errors import DataError, DiffuSSMError, StorageError
from diffussm.naming import is_remote, join

INDEX = "index.json"
MOMENTS = ("mean", "std", "mean_flip", "std_flip")
_DOWNLOAD_TIMEOUT_S = 60.0


def passport(url: str) -> Passport:
    """Read the passport of the latents at a folder or bucket URL.

    Raises:
        DataError: there is none, or it is malformed.
        StorageError: the store cannot be reached.
    """
    place = local_path(url)
    with tempfile.TemporaryDirectory(prefix="diffussm-passport-") as folder:
        path = fetch(place, FILE, Path(folder))
        if path is None:
            raise DataError(
                f"data.latents: found no {FILE} at {url}; the latents were not made, or not to the end",
                "run `diffussm prepare` with this config",
            )
        return Passport.from_json(path.read_bytes(), join(url, FILE))


def fetch(place: str, name: str, folder: Path) -> Path | None:
    """A local path of one file of the latents, copied to `folder` if they are remote; None if there is no such file.

    Raises:
        StorageError: the store cannot be reached, or the file not read.
    """
    if not is_remote(place):
        path = Path(place) / name
        return path if path.is_file() else None
    target = folder / name
    try:
        CloudDownloader.get(place).download(join(place, name), str(target), _DOWNLOAD_TIMEOUT_S)
    except Exception as error:
        if is_absent(error):
            return None
        raise storage_error(join(place, name), error) from error
    return target


def local_path(url: str) -> str:
    """`url` without a file:// scheme, home folder expanded; bucket URLs as they are, without a trailing slash."""
    return url.rstrip("/") if is_remote(url) else str(Path(url.removeprefix("file://")).expanduser())


def is_absent(error: BaseException) -> bool:
    """Whether a download failed because there is no such object."""
    return isinstance(error, FileNotFoundError) or _code(error) in ("404", "NoSuchKey")


def is_refused(error: BaseException) -> bool:
    """Whether a store answered, and its answer will be the same the next time: no bucket, or no right to read it."""
    return isinstance(error, PermissionError) or _code(error) in (
        "403", "AccessDenied", "InvalidAccessKeyId", "NoSuchBucket", "SignatureDoesNotMatch"
    )  # fmt: skip


def storage_error(place: str, error: BaseException) -> StorageError:
    """What streaming raised about a store, as ours."""
    return StorageError(
        f"{place}: cannot be read or written ({type(error).__name__}: {error})",
        "check that the bucket exists, its credentials, S3_ENDPOINT_URL and the network",
    )


@contextlib.contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Turn what streaming raises about a store, which is any exception, into a StorageError that names `place`."""
    try:
        yield
    except DiffuSSMError:
        raise
    except Exception as error:
        raise storage_error(place, error) from error


def _code(error: BaseException) -> str:
    """An S3 client's code of an answer; empty if there was no answer."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
