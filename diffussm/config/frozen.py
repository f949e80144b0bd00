"""Keys that decide what a run is. Once it has started they cannot change under its name. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffussm.errors import ConfigError

FROZEN = {
    "seed": "noise and order of the samples already seen came from it",
    "data.source": "the images seen so far are others",
    "data.resolution_px": "the latents have another size",
    "data.classes": "the labels mean other classes",
    "data.limit": "the data set is another one",
    "data.autoencoder": "the latents mean other pictures",
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
}
"""Key -> why it cannot change."""


def check_frozen(stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to go on with a run whose stored config differs from the current one in a frozen key.

    Args:
        stored: the run's config.yaml, as nested plain data.
        current: the config of this start, likewise.

    Raises:
        ConfigError: naming each key, what the run has, what was asked, and why it matters.
    """
    problems = []
    for key, why in FROZEN.items():
        was, now = _at(stored, key), _at(current, key)
        if was != now:
            problems.append(f"{key}: the run has {was!r}, asked was {now!r}; it cannot change: {why}")
    if problems:
        raise ConfigError("\n".join(problems), "set the run's own values, or give the new run another name")


def _at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value
