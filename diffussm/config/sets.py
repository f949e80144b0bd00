"""The sets of latents of a run: the main one, and those that `data.more` names beside it. Pure."""

from __future__ import annotations

import copy

from diffussm.config.schema import Config


def each_set(cfg: Config) -> list[Config]:
    """`cfg` once for each of its sets of latents, the main one first, as if it were the only one."""
    configs = []
    for text in (None, *cfg.data.more):
        one = copy.deepcopy(cfg)
        one.data.more = []
        if text is not None:
            one.data.resolution_px, one.data.latents = split(text)
        configs.append(one)
    return configs


def split(text: str) -> tuple[int, str]:
    """An entry RESOLUTION=PLACE of `data.more` as (pixels, place); (0, "") if it has no such form."""
    resolution, _, place = text.partition("=")
    return (int(resolution), place) if resolution.isdecimal() and place else (0, "")
