from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffussm.checkpoint.store import open_store
from diffussm.config.schema import Config, OnCorrupt, Precision, Stored
from diffussm.data import autoencoder, encode, images, latents, ledger, shards
from diffussm.data.passport import FILE, Passport
from diffussm.errors import DataError, StorageError
from tests.diffussm.data import sets


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sets.tiny_autoencoder(tmp_path_factory.mktemp("vae") / "a")


@pytest.fixture
def cfg(tmp_path: Path, vae: Path) -> Config:
    folder = sets.picture_folder(tmp_path / "pictures", {"a": 7, "b": 70, "c": 3})
    return sets.config(str(tmp_path / "out" / "latents"), folder, vae)


def stored(place: str) -> dict[int, dict[str, Any]]:
    """Samples of local shards by id, in the order of the shards."""
    index = json.loads((Path(place) / latents.INDEX).read_text())["shards"]
    samples = [sample for shard in index for sample in shards.read(open_store(place), shard, Path())]
    return {sample["id"]: sample for sample in samples}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def contents(place: str) -> dict[str, bytes]:
    store = open_store(place)
    return {key: store.read(key) for key in store.keys("")}


def test_shards_hold_the_scaled_moments_of_picture_and_mirror_image(cfg: Config, vae: Path) -> None:
    told: list[tuple[int, int]] = []
    passport = encode.prepare(cfg, progress=lambda done, of: told.append((done, of)))
    samples = stored(cfg.data.latents)
    network, source = autoencoder.load(str(vae)), images.open_source(cfg.data)
    assert sorted(samples) == list(range(80))
    for item in list(source)[::9]:
        picture = source.load(item)[None]
        mean, std = network.encode(picture)
        mean_flip, std_flip = network.encode(picture[:, :, ::-1].copy())
        sample = samples[item.id]
        assert sample["label"] == item.label
        expected = (mean, std, mean_flip, std_flip)
        for name, value in zip(latents.MOMENTS, expected, strict=True):
            assert sample[name].dtype == np.float16
            np.testing.assert_allclose(sample[name], value[0].numpy(), rtol=2e-3, atol=2e-3)
    assert told == [(0, 80), (64, 80), (80, 80)]
    assert passport.class_counts == (7, 70, 3)


def test_samples_are_stored_in_a_fixed_random_order(cfg: Config) -> None:
    encode.prepare(cfg)
    first = stored(cfg.data.latents)
    cfg.data.latents += "-again"
    encode.prepare(cfg)
    again = stored(cfg.data.latents)
    assert list(first) == list(again)
    labels = [sample["label"] for sample in first.values()]
    # In the source's order the first seven would be all of class a.
    assert len(set(labels[:40])) == 3
    assert labels != sorted(labels)


def test_passport_tells_how_the_latents_were_made(cfg: Config, vae: Path) -> None:
    returned = encode.prepare(cfg)
    read = latents.passport(cfg.data.latents)
    assert read == returned
    assert read.classes == ("a", "b", "c")
    assert (read.number, read.resolution_px, read.downsampling) == (80, 8, 2)
    assert read.latent_shape == (2, 4, 4)
    assert (read.scaling_factor, read.shift) == (0.5, 0.25)
    assert read.autoencoder_digest == autoencoder.digest(str(vae))
    assert (read.latent.channels, read.latent.height, read.latent.width, read.latent.classes) == (2, 4, 4, 3)
    values = stored(cfg.data.latents).values()
    mean = np.stack([v["mean"] for v in values]).astype(float)
    second = mean**2 + np.stack([v["std"] for v in values]).astype(float) ** 2
    assert read.latent_mean == pytest.approx(mean.mean(), abs=1e-6)
    assert read.latent_std == pytest.approx(np.sqrt(second.mean() - mean.mean() ** 2), abs=1e-6)
    index = json.loads((Path(cfg.data.latents) / latents.INDEX).read_text())
    assert len(index["shards"]) > 1
    assert all(set(shard["raw_data"]["hashes"]) == {"sha1", "xxh64"} for shard in index["shards"])


def test_second_time_is_a_no_op(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encode.prepare(cfg)
    monkeypatch.setattr(images, "open_source", None)
    assert encode.prepare(cfg) == first


def test_latents_of_pictures_elsewhere_are_used_and_told(
    cfg: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, was = encode.prepare(cfg), cfg.data.images
    encode.prepare(cfg)
    assert not caplog.messages
    cfg.data.images = str(tmp_path / "moved")
    assert encode.prepare(cfg) == first
    assert [m for m in caplog.messages if f"made of {was}, the config names {tmp_path}/moved" in m]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("resolution_px", 16, "data.resolution_px: .*made with 8, the config asks for 16"),
        ("classes", ["a", "b"], r"data.classes: .*made with \[\]"),
        ("limit", 5, "data.limit"),
        ("autoencoder", None, "data.autoencoder"),
        ("stored", Stored.sample, "data.stored: .*made with 'moments'"),
        ("encoder_precision", Precision.bf16, "data.encoder_precision"),
    ],
)
def test_other_settings_are_refused_by_name(cfg: Config, tmp_path: Path, key: str, value: Any, message: str) -> None:
    encode.prepare(cfg)
    value = str(sets.tiny_autoencoder(tmp_path / "other", seed=1)) if value is None else value
    setattr(cfg.data, key, value)
    with pytest.raises(DataError, match=message):
        encode.prepare(cfg)


def test_corrupt_pictures_are_skipped_named_and_counted(cfg: Config, caplog: pytest.LogCaptureFixture) -> None:
    (Path(cfg.data.images) / "b" / "003.png").write_bytes(b"no picture")
    passport = encode.prepare(cfg)
    assert [skipped.name for skipped in passport.skipped] == ["b/003.png"]
    assert passport.class_counts == (7, 69, 3)
    assert passport.number == 79
    assert "b/003.png" in caplog.text
    # Ids stay those of the source, so that one bad file does not renumber the others.
    assert sorted(stored(cfg.data.latents)) == [i for i in range(80) if i != 7 + 3]


def test_corrupt_picture_stops_when_asked_to(cfg: Config) -> None:
    (Path(cfg.data.images) / "b" / "003.png").write_bytes(b"no picture")
    cfg.data.on_corrupt = OnCorrupt.fail
    with pytest.raises(images.CorruptImageError, match=r"b/003\.png"):
        encode.prepare(cfg)
    assert not (Path(cfg.data.latents) / FILE).exists()


def test_class_without_a_readable_picture_is_refused(cfg: Config) -> None:
    broken = list((Path(cfg.data.images) / "c").iterdir())
    good = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="no picture of c"):
        encode.prepare(cfg)
    assert not (Path(cfg.data.latents) / FILE).exists()
    # Once they are repaired, the same command takes them up.
    for path, content in zip(broken, good, strict=True):
        path.write_bytes(content)
    assert encode.prepare(cfg).number == 80


def test_what_a_killed_attempt_left_is_overwritten(cfg: Config) -> None:
    whole = encode.prepare(cfg)
    before = contents(cfg.data.latents)
    place = Path(cfg.data.latents)
    (place / FILE).unlink()
    (place / "ledger" / "000000.json").unlink()
    (place / "index.json").write_text("{}")
    next(place.glob("*.mds")).write_bytes(b"half")
    (place / "shard.00000.mds").write_bytes(b"of an older version")
    assert encode.prepare(cfg) == whole
    assert contents(cfg.data.latents) == before


class TestUnits:
    """Work that stops in the middle and goes on."""

    @pytest.fixture
    def cfg(self, cfg: Config) -> Config:
        cfg.prepare.unit_images, cfg.prepare.batch = 12, 5
        return cfg

    def test_a_rerun_does_only_what_is_left(self, cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = encode.prepare(cfg)
        before = contents(cfg.data.latents)
        place = Path(cfg.data.latents)
        (place / FILE).unlink()
        (place / "ledger" / "000003.json").unlink()
        told: list[tuple[int, int]] = []
        assert encode.prepare(cfg, progress=lambda done, of: told.append((done, of))) == whole
        assert told == [(68, 80), (73, 80), (78, 80), (80, 80)]
        assert contents(cfg.data.latents) == before

    def test_a_unit_whose_shard_is_gone_is_made_again(self, cfg: Config, caplog: pytest.LogCaptureFixture) -> None:
        encode.prepare(cfg)
        before = contents(cfg.data.latents)
        place = Path(cfg.data.latents)
        (place / FILE).unlink()
        (place / "shard.000002.000.mds").unlink()
        encode.prepare(cfg)
        assert "shard.000002.000.mds of a finished unit is gone" in caplog.text
        assert contents(cfg.data.latents) == before

    def test_another_plan_is_refused_and_says_what_differs(self, cfg: Config) -> None:
        encode.prepare(cfg)
        (Path(cfg.data.latents) / FILE).unlink()
        cfg.prepare.batch = 6
        with pytest.raises(DataError, match=r"another plan \(prepare.batch: 5, now 6\)"):
            encode.prepare(cfg)
        cfg.prepare.batch = 5
        (Path(cfg.data.images) / "a" / "000.png").rename(Path(cfg.data.images) / "a" / "zzz.png")
        with pytest.raises(DataError, match="the pictures have changed"):
            encode.prepare(cfg)

    def test_a_latent_does_not_depend_on_the_unit_it_is_in(self, cfg: Config) -> None:
        encode.prepare(cfg)
        first = stored(cfg.data.latents)
        cfg.data.latents += "-again"
        cfg.prepare.unit_images = 33
        encode.prepare(cfg)
        again = stored(cfg.data.latents)
        assert list(first) == list(again)
        for i, sample in first.items():
            assert all(np.array_equal(sample[name], again[i][name]) for name in latents.MOMENTS)

    def test_a_broken_record_is_named(self, cfg: Config) -> None:
        encode.prepare(cfg)
        place = Path(cfg.data.latents)
        (place / FILE).unlink()
        (place / "ledger" / "000001.json").write_text("{}")
        with pytest.raises(DataError, match=r"ledger/000001\.json: is no record of a unit"):
            encode.prepare(cfg)

    def test_every_byte_of_the_ledger_is_needed(self, cfg: Config) -> None:
        encode.prepare(cfg)
        record = open_store(cfg.data.latents).read(ledger.key(0))
        assert ledger.Record.from_json(record, "").to_json() == record


def test_one_sample_is_drawn_by_the_pictures_own_key(cfg: Config) -> None:
    encode.prepare(cfg)
    moments = stored(cfg.data.latents)
    cfg.data.latents += "-sample"
    cfg.data.stored = Stored.sample
    passport = encode.prepare(cfg)
    assert (passport.stored, passport.columns) == ("sample", ("mean", "mean_flip"))
    samples = stored(cfg.data.latents)
    draws = []
    for i, sample in samples.items():
        assert set(sample) == {"id", "label", "mean", "mean_flip"}
        draws.append((sample["mean"].astype(float) - moments[i]["mean"]) / moments[i]["std"])
    assert np.mean(draws) == pytest.approx(0, abs=0.1)
    assert np.std(draws) == pytest.approx(1, abs=0.1)
    assert passport.latent_std == pytest.approx(latents.passport(cfg.data.latents[:-7]).latent_std, rel=0.05)


def test_bf16_is_near_fp32_and_says_so(cfg: Config) -> None:
    encode.prepare(cfg)
    exact = stored(cfg.data.latents)
    cfg.data.latents += "-bf16"
    cfg.data.encoder_precision = Precision.bf16
    assert encode.prepare(cfg).encoder_precision == "bf16"
    near = stored(cfg.data.latents)
    difference = [np.abs(near[i]["mean"].astype(float) - exact[i]["mean"]).max() for i in exact]
    assert 0 < max(difference) < 0.05


def test_latents_beyond_half_precision_are_refused_by_name(cfg: Config, tmp_path: Path) -> None:
    cfg.data.autoencoder = str(sets.tiny_autoencoder(tmp_path / "wild", scaling_factor=1e7))
    with pytest.raises(DataError, match=r"mean of [abc]/\d+\.png reaches .*float16 holds up to 65504"):
        encode.prepare(cfg)


def test_other_things_are_not_overwritten(cfg: Config) -> None:
    place = Path(cfg.data.latents)
    place.mkdir(parents=True)
    assert encode.existing(cfg) is None  # An empty folder is fine.
    (place / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="other things than latents"):
        encode.prepare(cfg)
    assert names(place) == ["thesis.tex"]


def test_place_that_cannot_be_written(cfg: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cfg.data.latents = str(tmp_path / "file" / "latents")
    with pytest.raises(StorageError, match="latents"):
        encode.prepare(cfg)


def test_resolution_must_fit_the_autoencoder(cfg: Config) -> None:
    cfg.data.resolution_px = 9
    with pytest.raises(DataError, match=r"found 9; .* multiples of 2"):
        encode.prepare(cfg)


@pytest.mark.parametrize(
    "change", [lambda v: v | {"version": 2}, lambda v: v | {"colour": 1}, lambda v: {}, lambda v: [1], None]
)
def test_malformed_passport_is_refused(cfg: Config, change: Any) -> None:
    encode.prepare(cfg)
    path = Path(cfg.data.latents) / FILE
    path.write_text("{" if change is None else json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=r"passport\.json: (found a|is no) passport"):
        latents.passport(cfg.data.latents)


def test_passport_survives_its_own_file(cfg: Config) -> None:
    (Path(cfg.data.images) / "b" / "003.png").write_bytes(b"no picture")
    passport = encode.prepare(cfg)
    assert Passport.from_json(passport.to_json(), "") == passport
