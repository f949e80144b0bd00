"""What the network will denoise, as far as it can be known without a network, torch or the data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from diffussm.config.schema import Config
from diffussm.model.presets import LatentShape

PASSPORT = "passport.json"

KNOWN = {
    name: {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}
    for name in ("stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse", "stabilityai/sdxl-vae")
}
"""Autoencoders on the hub that recipes name, so that a plan need not fetch them: from their config.json."""


@dataclass(frozen=True)
class Latent:
    """Shape of the latents, and how it is known."""

    shape: LatentShape
    source: str
    counted: bool
    """Whether the number of classes is known; if not, the shape has one."""
    images: int = 0
    """Number of images in the data set; 0: not known."""

    @property
    def sample_bytes(self) -> int:
        """Bytes of one image's latents: mean and deviation of the posterior, of the picture and its mirror image."""
        return 4 * 2 * self.shape.channels * self.shape.length  # fp16


def latent(cfg: Config) -> Latent | None:
    """The latents of `cfg`; None if the autoencoder would have to be fetched to know them.

    Latents that were made on this machine say it themselves. Otherwise the autoencoder's own config does, with the
    classes of `data.classes` or their number in section `plan`.
    """
    passport = Path(cfg.data.latents.removeprefix("file://")) / PASSPORT
    if passport.is_file():
        made = json.loads(passport.read_text())
        channels, height, wide = made["latent_shape"]
        number = made.get("number") or cfg.plan.dataset_images
        return Latent(LatentShape(channels, height, wide, len(made["classes"])), str(passport), True, number)
    found = _autoencoder(cfg.data.autoencoder)
    if found is None:
        return None
    levels = found.get("encoder_block_out_channels") or found["block_out_channels"]  # of Tiny and DC, or of KL
    side = cfg.data.resolution_px // 2 ** (len(levels) - 1)
    classes = len(cfg.data.classes) or cfg.plan.dataset_classes
    shape = LatentShape(found["latent_channels"], side, side, classes or 1)
    images = cfg.plan.dataset_images
    return Latent(shape, cfg.data.autoencoder, bool(classes), min(images, cfg.data.limit or images))


def _autoencoder(spec: str) -> dict[str, Any] | None:
    """config.json of a built-in or known autoencoder or of a local folder; None for one that has to be fetched."""
    if spec in KNOWN and not Path(spec).exists():
        return KNOWN[spec]
    if spec.startswith("builtin:"):
        name = spec.removeprefix("builtin:")
        file = resources.files("diffussm") / "data" / "weights" / name / "config.json"
    else:
        file = Path(spec) / "config.json"
    return json.loads(file.read_text()) if file.is_file() else None
