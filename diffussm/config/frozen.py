"""Keys that decide what a run is. Once it has started they cannot change under its name. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from diffussm.config.explain import table
from diffussm.errors import ConfigError

FROZEN = {
    "seed": "noise and order of the samples already seen came from it",
    "data.source": "the images seen so far are others",
    "data.more": "the images seen so far are others",
    "data.resolution_px": "the latents have another size",
    "data.classes": "the labels mean other classes",
    "data.limit": "the data set is another one",
    "data.autoencoder": "the latents mean other pictures",
    "data.encoder_precision": "the latents are others",
    "data.stored": "the latents are others",
    "data.flip": "each sample's draws come in a fixed order",
    "data.canonical_nodes": "the order of the samples follows from it",
    "data.shuffle_block_images": "the order of the samples follows from it",
    "model.preset": "the weights have other shapes",
    "model.width": "the weights have other shapes",
    "model.depth": "the weights have other shapes",
    "model.hourglass": "the weights have other shapes",
    "model.state": "the weights have other shapes",
    "model.pos_embed": "the weights were trained with the other embedding",
    "diffusion.timesteps": "the network has learned this noise schedule",
    "diffusion.beta_start": "the network has learned this noise schedule",
    "diffusion.beta_end": "the network has learned this noise schedule",
    "diffusion.label_drop": "each sample's draws come in a fixed order",
    "train.global_batch": "images seen and position in the data are counted in it",
    "train.ema": "the average holds the weights with this decay",
    "train.start_from": "the first weights came from it",
    "train.power_ema": "an average holds the weights from the first step on",
}
"""Key -> why it cannot change."""


def check_frozen(stored: object, current: Mapping[str, Any], where: str = "config.yaml") -> None:
    """Refuse to go on with a run whose stored config differs from the current one in a frozen key.

    Args:
        stored: the run's config.yaml, as nested plain data. A key that it lacks is newer than the run, which so had
            the key's default.
        current: the config of this start, likewise.
        where: what to call the stored config.

    Raises:
        ConfigError: naming each key, what the run has, what was asked, and why it matters; or `stored` is no config.
    """
    if not isinstance(stored, Mapping):
        raise ConfigError(f"{where}: is not a config", "restore the file, or give the new run another name")
    defaults = table()
    problems = []
    for key, why in FROZEN.items():
        now = _at(current, key)
        try:
            was = _at(stored, key)
        except (KeyError, TypeError):
            was = plain(defaults[key].default)
        if was != now:
            problems.append(f"{key}: the run has {was!r}, asked was {now!r}; it cannot change: {why}")
    if problems:
        raise ConfigError("\n".join(problems), "set the run's own values, or give the new run another name")


def plain(value: object) -> object:
    """A default as it stands in YAML: an enum by its name."""
    return value.name if isinstance(value, Enum) else value


def _at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value
