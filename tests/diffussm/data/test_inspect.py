"""`python -m diffussm.data`: what is printed, drawn and verified, on disk and in a bucket."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffussm.config import dump
from diffussm.config.schema import Config
from diffussm.data import autoencoder, encode, images, inspect
from diffussm.data.__main__ import main
from tests.diffussm.data import sets
from tests.s3 import BUCKET, S3Server


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("made")
    folder = sets.picture_folder(root / "pictures", {"ant": 7, "bee": 12, "cow": 2})
    (folder / "bee" / "003.png").write_bytes(b"no picture")
    Image.new("L", (30, 20), 9).save(folder / "cow" / "grey.png")
    cfg = sets.config(str(root / "latents"), folder, sets.tiny_autoencoder(root / "vae"))
    cfg.prepare.unit_images = 9
    encode.prepare(cfg)
    return cfg


def test_the_numbers_are_told(made: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([made.data.latents, "--grid", str(tmp_path / "g.png")]) == 0
    said = capsys.readouterr().out
    assert "21 of 3 classes, 1 skipped" in said
    assert "converted: 1 grey" in said
    assert "skipped, no-image: bee/003.png" in said
    assert "(z - 0.25) * 0.5" in said
    assert [line.split()[:2] for line in said.splitlines() if "##" in line] == [
        ["ant", "7"],
        ["bee", "11"],
        ["cow", "3"],
    ]
    assert str(tmp_path / "g.png") in said


def test_many_classes_show_their_ends() -> None:
    lines = inspect.histogram([f"c{i:03}" for i in range(100)], list(range(1, 101)))
    assert len(lines) == 41
    assert lines[0].startswith("c099  100  ####")
    assert lines[20] == "... 60 classes between; quartiles 1, 26, 50, 75, 100"
    assert lines[-1].startswith("c000    1  #")


def cells(png: bytes, side: int, scale: int, columns: int, rows: int) -> np.ndarray[Any, Any]:
    """The grid's pictures (rows, columns, side, side, 3)."""
    canvas = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    step = side * scale + 2
    left = canvas.shape[1] - 6 - columns * step
    top = 6
    return np.stack([
        np.stack([
            canvas[top + r * step :, left + c * step :][: side * scale : scale, : side * scale : scale]
            for c in range(columns)
        ])
        for r in range(rows)
    ])  # fmt: skip


def test_the_grid_shows_source_latent_and_mirror_image(made: Config) -> None:
    found = inspect.find(made.data.latents)
    source = inspect.source_of(found)
    assert isinstance(source, images.ImageSource)
    shown = cells(inspect.paint(found, source, 2), 8, 8, 6, 3)
    network = autoencoder.load(made.data.autoencoder)
    originals = {source.load(item).tobytes() for item in source if item.label == 1 and item.name != "bee/003.png"}
    for pair in (0, 3):
        picture = shown[1, pair]
        assert picture.tobytes() in originals
        both = np.stack([picture, picture[:, ::-1]])
        decoded = network.decode(network.encode(both)[0])
        assert np.abs(decoded.astype(int) - shown[1, pair + 1 : pair + 3]).max() <= 1  # half precision lies between


def test_without_sources_it_says_so_and_shows_the_rest(
    made: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = Path(made.data.images)
    hidden = pictures.rename(pictures.with_name("elsewhere"))
    try:
        assert main([made.data.latents, "--grid", str(tmp_path / "g.png")]) == 0
    finally:
        hidden.rename(pictures)
    assert "the grid shows no sources: data.images: found" in capsys.readouterr().err
    picture = pictures / "ant" / "000.png"
    picture.rename(pictures / "ant" / "999.png")
    try:
        assert inspect.source_of(inspect.find(made.data.latents)) == "they are not the same pictures any more"
    finally:
        (pictures / "ant" / "999.png").rename(picture)


def test_a_run_and_a_config_name_their_latents(made: Config, tmp_path: Path) -> None:
    made.storage, made.train.images = str(tmp_path), 8
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "config.yaml").write_text(dump(made))
    for what in (tmp_path / "test", tmp_path / "test" / "config.yaml"):
        assert inspect.find(str(what)).store.url == made.data.latents


def test_verify_names_each_failure(
    made: Config, tmp_path: Path, s3_server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = sets.config(s3_server.url("verify"), Path(made.data.images), Path(made.data.autoencoder))
    cfg.prepare.unit_images = 9
    encode.prepare(cfg)
    # Not the same pictures' places, so not the same passport; but the same shards and index.
    assert inspect.find(cfg.data.latents).passport.index_digest == inspect.find(made.data.latents).passport.index_digest
    assert main([cfg.data.latents, "--verify"]) == 0
    assert "every file is as it was written" in capsys.readouterr().out
    client = s3_server.client()
    names = s3_server.keys("verify/shard.")
    assert len(names) >= 3
    content = client.get_object(Bucket=BUCKET, Key=names[0])["Body"].read()
    client.put_object(Bucket=BUCKET, Key=names[0], Body=content[:-1] + bytes([content[-1] ^ 1]))
    client.put_object(Bucket=BUCKET, Key=names[1], Body=content[:-1])
    client.delete_object(Bucket=BUCKET, Key=names[2])
    client.put_object(
        Bucket=BUCKET, Key="verify/index.json",
        Body=client.get_object(Bucket=BUCKET, Key="verify/index.json")["Body"].read() + b" ",
    )  # fmt: skip
    assert main([cfg.data.latents, "--verify"]) == 65
    said = capsys.readouterr().err
    for failure in ("4 failures", "index.json has SHA-256", "000.mds has sha1", "bytes of", "000.mds is missing"):
        assert failure in said


def test_what_is_no_set_of_latents_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 65
    assert "neither passport.json (latents) nor config.yaml (a run)" in capsys.readouterr().err
