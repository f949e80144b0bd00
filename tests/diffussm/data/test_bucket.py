"""Latents in a real object store."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffussm.config.schema import Config
from diffussm.data import encode, latents
from diffussm.data.cursor import Cursor
from diffussm.errors import DataError, StorageError
from tests.diffussm.data import sets
from tests.diffussm.data.test_latents import open_here, read_ids
from tests.s3 import BUCKET, S3Server


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("bucket")
    return sets.picture_folder(root / "pictures", {"a": 20, "b": 21}), sets.tiny_autoencoder(root / "vae")


@pytest.fixture
def cfg(pictures: tuple[Path, Path], s3_server: S3Server, request: pytest.FixtureRequest) -> Config:
    name = request.node.name.replace("[", "-").replace("]", "")
    return sets.config(s3_server.url(name), *pictures)


def test_bucket_and_folder_give_the_same_batches(cfg: Config, s3_server: S3Server, tmp_path: Path) -> None:
    passport = encode.prepare(cfg)
    keys = [key.split("/")[-1] for key in s3_server.keys(cfg.data.latents.removeprefix(f"s3://{BUCKET}/"))]
    assert "passport.json" in keys
    assert "index.json" in keys
    assert sum(key.endswith(".mds") for key in keys) > 1
    assert latents.passport(cfg.data.latents + "/") == passport
    assert encode.prepare(cfg) == passport
    from_bucket = read_ids(open_here(cfg, tmp_path / "a"), Cursor(0, 8), 8)
    # Shards are cached below scratch, in a folder that names their index.
    assert list((tmp_path / "a" / f"latents-{passport.index_digest[:16]}").glob("*.mds"))
    cfg.data.latents = str(tmp_path / "local")
    assert encode.prepare(cfg).index_digest == passport.index_digest
    assert read_ids(open_here(cfg, tmp_path / "b"), Cursor(0, 8), 8) == from_bucket


def test_cache_outlives_an_attempt(cfg: Config, s3_server: S3Server, tmp_path: Path) -> None:
    encode.prepare(cfg)
    cfg.data.cache = str(tmp_path / "cache")
    first = read_ids(open_here(cfg, tmp_path / "a"), Cursor(), 5)
    prefix = cfg.data.latents.removeprefix(f"s3://{BUCKET}/")
    for key in s3_server.keys(prefix):
        if key.endswith(".mds"):
            s3_server.client().delete_object(Bucket=BUCKET, Key=key)
    assert read_ids(open_here(cfg, tmp_path / "b"), Cursor(), 5) == first


def test_shards_without_passport_do_not_count_and_are_made_again(
    cfg: Config,
    s3_server: S3Server,
    tmp_path: Path,
) -> None:
    encode.prepare(cfg)
    prefix = cfg.data.latents.removeprefix(f"s3://{BUCKET}/")
    s3_server.client().delete_object(Bucket=BUCKET, Key=f"{prefix}/passport.json")
    with pytest.raises(DataError, match=r"found no passport\.json"):
        open_here(cfg, tmp_path)
    assert encode.prepare(cfg).number == 41
    assert len(read_ids(open_here(cfg, tmp_path), Cursor(), 6)) == 6


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_damaged_shard_is_an_error(cfg: Config, s3_server: S3Server, tmp_path: Path, damage: str) -> None:
    encode.prepare(cfg)
    prefix = cfg.data.latents.removeprefix(f"s3://{BUCKET}/")
    key = next(key for key in s3_server.keys(prefix) if key.endswith(".mds"))
    client = s3_server.client()
    if damage == "missing":
        client.delete_object(Bucket=BUCKET, Key=key)
    else:
        content = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        client.put_object(Bucket=BUCKET, Key=key, Body=content[:-1] + bytes([content[-1] ^ 1]))
    name = key.rsplit("/", 1)[-1]
    what = f"a shard, {name}, is missing" if damage == "missing" else f"shard {name} is corrupt"
    with pytest.raises(DataError, match=rf"{what}.*\[rank 0\]"):
        read_ids(open_here(cfg, tmp_path), Cursor(), 10)


def test_bucket_that_is_not_there(cfg: Config) -> None:
    cfg.data.latents = "s3://no-such-bucket/latents"
    with pytest.raises(StorageError, match="s3://no-such-bucket"):
        encode.prepare(cfg)


def test_wrong_credentials(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="s3://") as caught:
        encode.prepare(cfg)
    assert "credentials" in caught.value.remedy


def test_store_that_is_away(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot be read or written"):
        latents.passport(cfg.data.latents)
