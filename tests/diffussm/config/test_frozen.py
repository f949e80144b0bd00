"""What a run may not change once it has started."""

from __future__ import annotations

import pytest
import yaml

from diffussm.config import Config, dump
from diffussm.config.explain import table
from diffussm.config.frozen import FROZEN, check_frozen
from diffussm.errors import ConfigError


def plain() -> dict:  # type: ignore[type-arg]
    cfg = Config(name="a")
    cfg.data.latents, cfg.train.images = "x", 1000
    loaded: dict = yaml.safe_load(dump(cfg))  # type: ignore[type-arg]
    return loaded


def test_every_frozen_key_exists_and_has_its_reason() -> None:
    assert set(FROZEN) <= set(table())
    assert all(FROZEN.values())


def test_the_same_config_goes_on() -> None:
    check_frozen(plain(), plain())


@pytest.mark.parametrize("key", FROZEN)
def test_each_frozen_key_is_held(key: str) -> None:
    current = plain()
    section, _, last = key.rpartition(".")
    (current[section] if section else current)[last] = "other"
    with pytest.raises(ConfigError) as caught:
        check_frozen(plain(), current)
    assert key in caught.value.message
    assert "'other'" in caught.value.message
    assert FROZEN[key] in caught.value.message
    with pytest.raises(ConfigError):
        check_frozen(current, plain())


@pytest.mark.parametrize(
    "key", ["train.images", "train.lr", "cluster.workers", "storage", "sample.steps", "train.zero_stage"]
)
def test_other_keys_may_change(key: str) -> None:
    current = plain()
    section, _, last = key.rpartition(".")
    (current[section] if section else current)[last] = 7
    check_frozen(plain(), current)


def test_all_changes_are_named_at_once() -> None:
    current = plain()
    current["seed"], current["model"]["state"] = 1, 2
    with pytest.raises(ConfigError, match=r"(?s)seed.*model\.state"):
        check_frozen(plain(), current)
