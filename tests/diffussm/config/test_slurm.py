"""Section `slurm`: what may stand in a batch script and what may not."""

from __future__ import annotations

import pytest

from diffussm.config import Config, check
from diffussm.config.schema_jobs import Container
from diffussm.config.slurm import is_word
from diffussm.errors import ConfigError

HOSTILE = ["a b", "a\nb", "a'b", 'a"b', "$(id)", "`id`", "a;b", "a\\b", "a\x00b", "a\tb", "é", "x" * 600]


@pytest.fixture
def cfg() -> Config:
    made = Config(name="a")
    made.data.latents, made.train.images = "/l", 1000
    return made


@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint", "exclude", "gres", "dependency", "begin"])
@pytest.mark.parametrize("value", HOSTILE)
def test_words_are_plain(cfg: Config, key: str, value: str) -> None:
    check(cfg)
    setattr(cfg.slurm, key, value)
    with pytest.raises(ConfigError, match=rf"slurm\.{key}"):
        check(cfg)


@pytest.mark.parametrize(
    "value", ["gpu:h100:8", "a&b|c*2", "[rack1*2&rack2*4]", "n[01-03,7]", "afterok:1,singleton", ""]
)
def test_what_slurm_writes_is_allowed(value: str) -> None:
    assert is_word(value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("environment", ["A"]),
        ("environment", ["A=b\nc"]),
        ("environment", ["A B=c"]),
        ("environment", ["$(id)=c"]),
        ("modules", ["a b"]),
        ("modules", [""]),
        ("options", ["nice"]),
        ("options", ["--nice=$(id)"]),
        ("options", ["--wrap=id"]),
        ("options", ["--job-name=x"]),
        ("options", ["--comment=x"]),
        ("options", ["--comm=x"]),
        ("logs", ""),
        ("logs", "a\nb"),
        ("logs", "a%j"),
        ("logs", 'a"b'),
        ("python", "a\nb"),
        ("mounts", ["/a:/b"]),
        ("image", "x.sif"),
        ("warning_s", 0),
        ("warning_s", 86_400),
        ("time_s", 30),
    ],
)
def test_what_does_not_fit_is_refused(cfg: Config, key: str, value: object) -> None:
    setattr(cfg.slurm, key, value)
    with pytest.raises(ConfigError, match=rf"slurm\.{key}"):
        check(cfg)


def test_a_container_needs_an_image(cfg: Config) -> None:
    cfg.slurm.container = Container.pyxis
    with pytest.raises(ConfigError, match=r"slurm\.image"):
        check(cfg)
    cfg.slurm.image, cfg.slurm.mounts = "docker://x y", ["/a b:/c"]
    check(cfg)
    cfg.slurm.mounts = ["/a:/b,/c:/d"]
    with pytest.raises(ConfigError, match=r"slurm\.mounts"):
        check(cfg)


def test_odd_characters_are_allowed_where_they_are_quoted(cfg: Config) -> None:
    cfg.slurm.environment, cfg.slurm.python = ["A='\"$(id)` é"], "/my python"
    check(cfg)
