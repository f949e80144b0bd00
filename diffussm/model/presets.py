"""Named sizes of the network, and what must fit what. Imports no torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from diffussm.config.schema import ModelConfig
from diffussm.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """A named size."""

    width: int
    """Channels D of the residual stream."""
    depth: int
    """Number of blocks."""


PRESETS: dict[str, Preset] = {
    "tiny": Preset(width=64, depth=2),  # tests
    "emoji": Preset(width=160, depth=6),  # the quick start: minutes on two CPU cores
    "S": Preset(width=384, depth=12),  # the paper's smallest width; DiT-S's depth
    "B": Preset(width=768, depth=12),  # DiT-B's shape
    "L": Preset(width=1024, depth=24),  # DiT-L's shape; the paper gives no depth for its own L
    "XL": Preset(width=1152, depth=29),  # the paper's model
}


@dataclass(frozen=True)
class LatentShape:
    """What the network denoises."""

    channels: int
    """C."""
    height: int
    """H."""
    width: int
    """W."""
    classes: int
    """Number of labels; label `classes` is the null class."""

    @property
    def length(self) -> int:
        """Length L = H W of the sequence."""
        return self.height * self.width


def resolve(cfg: ModelConfig) -> tuple[int, int]:
    """(width, depth) of `cfg`: the preset's, unless the config sets its own.

    Raises:
        ConfigError: no preset of that name (the nearest is named), or a size below 1.
    """
    # Preset names differ by case alone from what people type, so the search for the nearest ignores it.
    preset = PRESETS.get(cfg.preset)
    if preset is None:
        by_lower = {name.lower(): name for name in PRESETS}
        near = difflib.get_close_matches(cfg.preset.lower(), by_lower, n=1, cutoff=0.3)
        raise ConfigError(
            f"model.preset: found {cfg.preset!r}; allowed are {', '.join(PRESETS)}",
            f"did you mean {by_lower[near[0]]!r}?" if near else "choose one of these; width and depth override it",
        )
    width = preset.width if cfg.width is None else cfg.width
    depth = preset.depth if cfg.depth is None else cfg.depth
    for key, value in (("width", width), ("depth", depth)):
        if value < 1:
            raise ConfigError(f"model.{key}: found {value}; allowed is 1 or more", f"leave model.{key} out")
    return width, depth


def check_fit(cfg: ModelConfig, latent: LatentShape) -> None:
    """Raise ConfigError where hourglass, state, width and latent do not fit each other."""
    width, _ = resolve(cfg)
    ratio = cfg.hourglass
    if ratio < 1 or latent.length % ratio:
        raise ConfigError(
            f"model.hourglass: found {ratio}; it must divide the latent's {latent.height} x {latent.width} = "
            f"{latent.length} positions",
            "2 fits every even latent",
        )
    if (2 * width) % ratio:
        raise ConfigError(
            f"model.hourglass: found {ratio}; it must divide twice the width, {2 * width}",
            "change model.width to a multiple of it",
        )
    if cfg.state < 2 or cfg.state % 2:
        raise ConfigError(f"model.state: found {cfg.state}; allowed are even numbers from 2", "64 is the usual size")
    if cfg.pos_embed.value == "sincos" and width % 4:
        raise ConfigError(
            f"model.pos_embed: sincos needs a width that is a multiple of 4, found {width}",
            "set model.pos_embed=none or change model.width",
        )
    if min(latent.channels, latent.height, latent.width, latent.classes) < 1:
        raise ConfigError(f"latent: found {latent}; every size must be 1 or more", "check section data of the config")
