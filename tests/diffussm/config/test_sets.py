from __future__ import annotations

import pytest

from diffussm.config import Config, check
from diffussm.config.sets import each_set, split
from diffussm.errors import ConfigError


def config(*more: str) -> Config:
    cfg = Config(name="a")
    cfg.data.latents, cfg.train.images, cfg.data.more = "runs/latents-256", 10_000, list(more)
    return cfg


def test_each_set_is_a_config_of_its_own() -> None:
    cfg = config("512=s3://bucket/latents-512", "64=runs/a=b")
    check(cfg)
    places = [(one.data.resolution_px, one.data.latents, one.data.more) for one in each_set(cfg)]
    assert places == [(256, "runs/latents-256", []), (512, "s3://bucket/latents-512", []), (64, "runs/a=b", [])]
    assert cfg.data.latents == "runs/latents-256"


def test_an_entry_of_another_form_is_none() -> None:
    assert [split(text) for text in ("512", "=x", "512=", "x=512", "-8=x")] == [(0, "")] * 5


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["large=runs/x"], "RESOLUTION=PLACE"),
        (["4=runs/x"], "8 px or more"),
        (["512=ftp://x/y"], "s3:// URL"),
        (["512=runs/latents-256"], "each place once"),
        (["512=runs/x", "64=runs/x"], "each place once"),
        (["9=runs/x"], "model.hourglass"),
    ],
)
def test_wrong_entries_are_refused(entries: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.more: found") as caught:
        check(config(*entries))
    assert words in caught.value.message
