"""Loading a config: layers, refusals that name the key, and the way there and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffussm.config import Config, digest, dump, load, preset
from diffussm.config.schema import OnCorrupt, Precision
from diffussm.errors import ConfigError, ExitCode

MINIMAL = "name: a-run\ndata:\n  latents: latents\ntrain:\n  images: 1000\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def refuse(path: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert caught.value.code is ExitCode.CONFIG
    return caught.value


def test_a_real_config_comes_back_with_defaults_and_typed_values(minimal: Path) -> None:
    cfg = load(minimal, ["train.precision=fp32", "train.lr=3e-4", "data.on_corrupt=fail", "model.width=96"])
    assert type(cfg) is Config
    assert (cfg.name, cfg.train.images, cfg.train.global_batch) == ("a-run", 1000, 256)
    assert cfg.train.precision is Precision.fp32
    assert cfg.data.on_corrupt is OnCorrupt.fail
    assert cfg.train.lr == 3e-4
    assert cfg.model.width == 96
    assert cfg.model.depth is None


def test_later_layers_win(minimal: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("base: minimal.yaml\nname: child\ntrain:\n  lr: 0.5\n  ema: 0.5\n")
    cfg = load(child, ["train.ema=0.25", "train.ema=0.125"])
    assert cfg.name == "child"
    assert cfg.data.latents == "latents"
    assert cfg.train.images == 1000
    assert (cfg.train.lr, cfg.train.ema) == (0.5, 0.125)


def test_a_base_is_found_beside_the_file_that_names_it(minimal: Path, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "mid.yaml").write_text("base: ../minimal.yaml\nseed: 7\n")
    (tmp_path / "top.yaml").write_text("base: below/mid.yaml\nname: top\n")
    cfg = load(tmp_path / "top.yaml")
    assert (cfg.name, cfg.seed, cfg.train.images) == ("top", 7, 1000)


def test_a_base_may_be_written_out_with_the_name_of_its_file(minimal: Path, tmp_path: Path) -> None:
    text = "".join(f"  {line}\n" for line in minimal.read_text().splitlines())
    (tmp_path / "job.yaml").write_text(f"base:\n  file: configs/minimal.yaml\n{text}seed: 7\n")
    cfg = load(tmp_path / "job.yaml")
    assert cfg == replace(load(minimal), seed=7)
    assert preset(tmp_path / "job.yaml") == ("configs/minimal.yaml", load(minimal))
    (tmp_path / "job.yaml").write_text(f"base:\n{text}")
    assert "base.file" in refuse(tmp_path / "job.yaml").message
    (tmp_path / "job.yaml").write_text(f"base:\n  file: configs/minimal.yaml\n  sed: 1\n{text}")
    assert refuse(tmp_path / "job.yaml").message.startswith("configs/minimal.yaml: sed: there is no such key")


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    assert "circle" in refuse(tmp_path / "a.yaml").message


def test_a_run_folder_stands_for_its_config(minimal: Path, tmp_path: Path) -> None:
    cfg = load(minimal)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "config.yaml").write_text(dump(cfg))
    assert load(tmp_path / "runs") == cfg


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.imags=3", "train.images"),
        ("lr=3", "train.lr"),
        ("modell.width=3", "model"),
        ("trian.lr=3", "train"),
        ("name_=x", "name"),
        ("sampler=ddim", "sample.sampler"),
        ("train.state=3", "model.state"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(minimal: Path, override: str, nearest: str) -> None:
    error = refuse(minimal, override)
    assert override.partition("=")[0].split(".")[0] in error.message
    assert error.remedy == f"did you mean {nearest}?"


def test_an_unknown_key_like_no_other_points_to_the_list(minimal: Path) -> None:
    assert "diffussm config" in refuse(minimal, "zzzzzz=1").remedy


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.precision=fp16", ["train.precision", "'fp16'", "fp32, bf16"]),
        ("train.images=1e6", ["train.images", "1000000.0", "whole number"]),
        ("train.images=many", ["train.images", "'many'", "whole number"]),
        ("train.images=null", ["train.images", "null", "whole number"]),
        ("train.lr=x", ["train.lr", "'x'", "a number"]),
        ("data.flip=maybe", ["data.flip", "'maybe'", "true or false"]),
        ("data.classes=x", ["data.classes", "'x'", "a list of text"]),
        ("data.classes=[1]", ["data.classes", "[1]", "a list of text"]),
        ("data.classes.0=x", ["data.classes", "a list of text"]),
        ("train.power_ema=[a]", ["train.power_ema", "['a']", "a list of numbers"]),
        ("train.power_ema=[true]", ["train.power_ema", "[True]", "a list of numbers"]),
        ("train.power_ema=0.05", ["train.power_ema", "0.05", "a list of numbers"]),
        ("train=3", ["train", "3", "train.lr"]),
        ("train.lr.x=1", ["train.lr", "a number"]),
        ("model.width=wide", ["model.width", "'wide'", "null"]),
        ("train.lr=[", ["train.lr=[", "YAML"]),
        ("train.lr", ["train.lr", "no key and value"]),
        ("=3", ["'=3'", "no key and value"]),
        ("train.ema=${nothing}", ["train.ema"]),
        ("train.ema=${train.ema}", ["train.ema"]),
        ("train.images=${name}", ["train.images"]),
    ],
)
def test_a_wrong_value_is_refused_by_key_value_and_what_is_allowed(
    minimal: Path, override: str, words: list[str]
) -> None:
    message = refuse(minimal, override).message
    for word in words:
        assert word in message


def test_text_that_looks_like_a_number_is_refused_in_a_file_and_kept_in_an_override(
    minimal: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(MINIMAL.replace("a-run", "007"))
    assert "quotes" in refuse(bad).remedy
    for text in ("1e5", "007", "on", "null"):
        assert load(minimal, [f"name={text}"]).name == text
    assert load(minimal, ["name='x'"]).name == "x"
    assert load(minimal, ["data.images=/a=b: c"]).data.images == "/a=b: c"


def test_missing_mandatory_keys_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    error = refuse(path)
    for key in ("name", "data.latents", "train.images"):
        assert key in error.message
        assert f"{key}=" in error.remedy


@pytest.mark.parametrize("content", ["[1, 2]", "name: [", "name: a\nname: b\n", "a: b: c", "just text\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert "bad.yaml" in refuse(path).message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refuse(tmp_path / "absent.yaml").message
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert "binary.yaml" in refuse(tmp_path / "binary.yaml").message
    assert "config.yaml" in refuse(tmp_path).message


def test_interpolation_is_resolved(minimal: Path) -> None:
    cfg = load(minimal, ["data.latents=${storage}/latents", "data.classes=[a, b]"])
    assert cfg.data.latents == "runs/latents"
    assert "${" not in dump(cfg)


def test_the_digest_tells_configs_apart(minimal: Path) -> None:
    one = load(minimal)
    assert digest(one) == digest(load(minimal))
    assert digest(one) != digest(load(minimal, ["observe.project=other"]))
    assert len(digest(one)) == 64


@settings(max_examples=60, deadline=None)
@given(
    name=st.text(alphabet="abc01.:#'\"- ", min_size=1, max_size=12),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    images=st.integers(min_value=0, max_value=2**62),
    classes=st.lists(st.text(alphabet="ab19 :-'", min_size=1, max_size=5), max_size=3),
    width=st.none() | st.integers(min_value=1, max_value=4096),
    power=st.lists(st.floats(0.01, 0.28), max_size=3),
)
def test_dump_and_load_are_inverse(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    lr: float,
    images: int,
    classes: list[str],
    width: int | None,
    power: list[float],
) -> None:
    cfg = Config(name=name)
    cfg.data.latents, cfg.data.classes = "x", classes
    cfg.train.images, cfg.train.lr, cfg.model.width = images, lr, width
    cfg.train.power_ema = power
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump(cfg))
    assert load(path) == cfg
