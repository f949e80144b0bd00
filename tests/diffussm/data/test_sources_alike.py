"""The same pictures from every kind of source, on disk and in a bucket, give the same latents bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffussm.checkpoint.store import open_store
from diffussm.config.schema import Config, Source
from diffussm.data import encode, images
from diffussm.data.passport import Passport
from tests.diffussm.data import sets
from tests.diffussm.data.test_encode import stored
from tests.s3 import BUCKET, S3Server


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> tuple[Path, str]:
    """The pictures in all layouts in a folder, and the same in a bucket."""
    root = tmp_path_factory.mktemp("alike")
    folder = sets.picture_folder(root / "folder", {"ant": 9, "bee": 15, "cow": 6}, side=36)
    for i, picture in enumerate(sorted(folder.rglob("*.png"))):
        if i % 3 == 0:
            Image.open(picture).save(picture.with_suffix(".jpg"), quality=90)
            picture.unlink()
    sets.tar_shards(folder, root / "tar", form="json")
    sets.parquet_files(folder, root / "parquet")
    for path in root.rglob("*"):
        if path.is_file():
            s3_server.client().upload_file(str(path), BUCKET, f"alike/{path.relative_to(root).as_posix()}")
    sets.tiny_autoencoder(root / "vae")
    return root, s3_server.url("alike")


def latents(cfg: Config) -> tuple[Passport, dict[bytes, tuple[int, bytes]]]:
    """Label and moments by the pixels of the picture, however the source orders it."""
    passport = encode.prepare(cfg)
    source = images.open_source(cfg.data)
    found = {}
    for i, sample in stored_anywhere(cfg).items():
        moments = b"".join(np.asarray(sample[name]).tobytes() for name in passport.columns)
        found[source.load(source.items[i]).tobytes()] = (sample["label"], moments)
    return passport, found


def stored_anywhere(cfg: Config) -> dict[int, dict[str, Any]]:
    store = open_store(cfg.data.latents)
    local = Path(cfg.data.autoencoder).parent / "copies" / cfg.data.latents.replace("/", "_")
    local.mkdir(parents=True, exist_ok=True)
    for key in store.keys(""):
        (local / key).parent.mkdir(exist_ok=True)
        (local / key).write_bytes(store.read(key))
    return stored(str(local))


def test_folder_tar_and_parquet_on_disk_and_in_a_bucket(
    places: tuple[Path, str], s3_server: S3Server, tmp_path: Path
) -> None:
    root, bucket = places
    seen = {}
    for kind in (Source.folder, Source.tar, Source.parquet):
        for where, target in ((str(root), str(tmp_path)), (bucket, s3_server.url("alike-latents"))):
            cfg = sets.config(f"{target}/{kind.name}", root / "x", root / "vae", source=kind)
            cfg.data.images = f"{where}/{kind.name}"
            cfg.prepare.unit_images, cfg.prepare.batch = 11, 4
            seen[kind.name, where] = latents(cfg)
    _, expected = seen["folder", str(root)]
    assert len(expected) == 30
    for key, (other, found) in seen.items():
        assert found == expected, key
        assert other.class_counts == (9, 15, 6)
    # The same layout in another place has the same bytes but for the place itself.
    for kind in ("folder", "tar", "parquet"):
        assert seen[kind, str(root)][0].index_digest == seen[kind, bucket][0].index_digest
        assert seen[kind, str(root)][0].plan_digest == seen[kind, bucket][0].plan_digest
