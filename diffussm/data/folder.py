"""Pictures that are a file each, in a folder or below a prefix: one sub-folder a class, or a labels file."""

from __future__ import annotations

import logging
import os
from pathlib import Path, PurePosixPath

from diffussm.checkpoint.store import open_store
from diffussm.config.schema import DataConfig
from diffussm.data.labels import read_labels
from diffussm.data.picture import SUFFIXES
from diffussm.data.source import FileReader, ImageSource, Where, from_labels, listed, local_folder
from diffussm.errors import DataError
from diffussm.naming import is_remote, join

_logger = logging.getLogger(__name__)


def open_folder(cfg: DataConfig) -> ImageSource:
    """List the pictures below `cfg.images`.

    The class of a picture is its first sub-folder; without sub-folders all pictures are one class, named after the
    folder. With `cfg.labels` the file says it for each picture, and pictures it does not name are left out.

    Raises:
        DataError: no such folder, no picture, a labelled picture that is not there, or as `source.from_labels`.
        StorageError: the bucket or the labels file cannot be read.
    """
    root = cfg.images.rstrip("/") if is_remote(cfg.images) else str(local_folder(cfg.images))
    names = _list(cfg, root)
    if cfg.labels:
        label_of = read_labels(cfg.labels, cfg.label_column)
        there = set(names)
        gone = [name for name in label_of if name not in there]
        if gone:
            raise DataError(
                f"data.labels: {cfg.labels} names {len(gone)} pictures that are not below {root}: {listed(gone)}",
                "names in the file are relative to data.images; add the pictures or remove their lines",
            )
        found = [(name, label_of[name], Where(join(root, name))) for name in names if name in label_of]
        if len(found) < len(names):
            _logger.warning("data.labels: %d pictures without a label are left out", len(names) - len(found))
    else:
        in_classes = [name for name in names if "/" in name]
        loose = len(names) - len(in_classes)
        if loose and in_classes:
            _logger.warning("data.images: %d pictures of %s lie in no class folder and are left out", loose, root)
        one = PurePosixPath(root).name
        found = [
            (name, name.split("/")[0] if in_classes else one, Where(join(root, name))) for name in in_classes or names
        ]
    if not found:
        raise DataError(
            f"data.images: {root} holds no pictures ({', '.join(SUFFIXES)}), so there are zero classes",
            "put the pictures of each class into a sub-folder of their own",
        )
    return from_labels(cfg, found, FileReader(), _class_folders(cfg, root, found) if not cfg.labels else ())


def _list(cfg: DataConfig, root: str) -> list[str]:
    """Names of all pictures relative to `root`, sorted; hidden files and folders are passed over."""
    if is_remote(root):
        names = [name for name in open_store(root + "/").keys("") if not _hidden(name)]
    elif cfg.images and Path(root).is_dir():
        names = []
        # Class folders of ImageNet are often links, so links are followed.
        for folder, folders, files in os.walk(root, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = Path(folder).relative_to(root)
            names += [(below / name).as_posix() for name in files if not name.startswith(".")]
    else:
        raise DataError(
            f"data.images: found {cfg.images!r}, which is no folder; source=folder needs one with a sub-folder a class",
            "set data.images to that folder",
        )
    return sorted(name for name in names if name.lower().endswith(SUFFIXES))


def _class_folders(cfg: DataConfig, root: str, found: list[tuple[str, str | int, Where]]) -> list[str]:
    """Class names; a local folder without pictures is named too, so that it is refused rather than forgotten."""
    names = {str(label) for _, label, _ in found}
    if not is_remote(root) and found[0][0].count("/"):
        names |= {p.name for p in Path(root).iterdir() if p.is_dir() and not p.name.startswith(".")}
    return sorted(names)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
