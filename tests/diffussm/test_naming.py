"""A run is its name: what a name may be, and what follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffussm import naming
from diffussm.errors import ConfigError
from diffussm.naming import RunPaths


@pytest.mark.parametrize("name", ["a", "7", "a-b", "imagenet-256.v2_x", "a" * 63])
def test_names_that_are_allowed(name: str) -> None:
    assert naming.check_run_name(name) == name


@pytest.mark.parametrize("name", ["", "A", "a b", "a/b", "-a", "a-", ".a", "a.", "a..b", "ä", "a\n", "a" * 64, "../a"])
def test_names_that_are_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        naming.check_run_name(name)
    assert repr(name) in caught.value.message
    assert caught.value.remedy


def test_what_is_remote() -> None:
    assert naming.is_remote("s3://bucket/x")
    assert not naming.is_remote("runs/x")
    assert not naming.is_remote("file:///runs")


def test_join_knows_no_double_slashes() -> None:
    assert naming.join("s3://bucket/", "/a/", "b") == "s3://bucket/a/b"
    assert naming.join("/runs", "a") == "/runs/a"


def test_absolute_leaves_buckets_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert naming.absolute("runs") == str(tmp_path / "runs")
    assert naming.absolute("/runs") == "/runs"
    assert naming.absolute("s3://bucket/x") == "s3://bucket/x"
    assert naming.absolute("") == ""


@pytest.mark.parametrize("storage", ["runs", "runs/", "s3://bucket/runs", "/a/b"])
def test_everything_of_a_run_lies_below_its_root(storage: str) -> None:
    paths = RunPaths(storage, "a-run")
    assert paths.root == storage.rstrip("/") + "/a-run"
    places = [paths.config, paths.metrics, paths.events, paths.summary, paths.checkpoints, paths.checkpoint(3)]
    places += [paths.samples(3), paths.evaluation(3, "x"), paths.attempt(2)]
    assert all(place.startswith(paths.root + "/") for place in places)
    assert len(set(places)) == len(places)
    assert paths.checkpoint(3).startswith(paths.checkpoints + "/")


def test_a_wrong_name_has_no_paths() -> None:
    with pytest.raises(ConfigError):
        _ = RunPaths("runs", "../other").root


@given(st.lists(st.integers(min_value=0, max_value=10**12 - 1), min_size=2, max_size=5, unique=True))
def test_checkpoints_sort_by_name_as_by_images(images: list[int]) -> None:
    paths = RunPaths("runs", "a")
    assert sorted(map(paths.checkpoint, images)) == [paths.checkpoint(each) for each in sorted(images)]


def test_the_wandb_id_follows_from_the_name() -> None:
    assert naming.wandb_id("a") == naming.wandb_id("a") != naming.wandb_id("b")
    assert len(naming.wandb_id("a")) == 16


def test_names_of_weights_say_what_they_are() -> None:
    assert naming.power_name(0.05) == "power-0.050"
    assert [naming.weights_kind(name) for name in ("none", "plain", naming.power_name(0.1))] == [
        "master", "ema-plain", "ema-power-0.100",
    ]  # fmt: skip
