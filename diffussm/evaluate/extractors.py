"""Feature networks: uint8 pictures in, named feature vectors out, and the one function that opens them.

A distance means something only together with the network and the preprocessing it was computed with. Each extractor
therefore names its metrics and has a digest over its weights and preprocessing; both go with every result.
"""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diffussm.errors import ConfigError, MissingError

POOL, SPATIAL, LOGITS = "pool", "spatial", "logits"
"""Taps: the vector of all metrics, the one of sFID, and the class logits of the Inception score."""

Features = dict[str, np.ndarray]
"""Tap -> float32 (B, length of the tap)."""


class Extractor(ABC):
    """A frozen feature network with its preprocessing."""

    name: str
    """Name in files and results."""
    metric_names: Mapping[str, str]
    """Kind (`frechet`, `spatial`, `kernel`, `inception`, `precision`, `recall`) -> what the result calls it."""
    taps: Mapping[str, int]
    """Tap -> its length; `pool` is always there."""
    digest: str
    """16 hexadecimal digits over weights and preprocessing; equal digests give comparable distances."""

    def extract(self, images: np.ndarray) -> Features:
        """Features of pictures; they do not depend on how the pictures are batched, up to rounding.

        Args:
            images: uint8 (B, H, W, 3), sRGB, any H and W.

        Returns:
            float32 (B, length) for each tap.

        Raises:
            TypeError: `images` is not uint8.
            ValueError: `images` is not (B, H, W, 3) with H, W > 0.
        """
        if images.dtype != np.uint8:
            raise TypeError(f"images: found dtype {images.dtype}, allowed is uint8")
        if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
            raise ValueError(f"images: found shape {images.shape}, allowed is (B, H, W, 3)")
        if len(images) == 0:
            return {tap: np.zeros((0, length), np.float32) for tap, length in self.taps.items()}
        return self._extract(images)

    @abstractmethod
    def _extract(self, images: np.ndarray) -> Features:
        """`extract` of at least one checked picture."""


def named_after(network: str) -> dict[str, str]:
    """Metric names for features of a network that is not ADM's: never FID unless it is FID."""
    return {"frechet": f"FD-{network}", "kernel": f"KD-{network}"} | {
        kind: f"{kind}-{network}" for kind in ("precision", "recall")
    }


class NetworkExtractor(Extractor):
    """An extractor whose network runs in torch, in chunks that suit the device.

    Args:
        device: torch device to run on.
    """

    CPU_CHUNK: ClassVar[int] = 8
    """Pictures of one forward pass on a CPU: larger ones leave the cache and run at half the speed."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)

    @abstractmethod
    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Taps, (B, length) each, of uint8 pixels (B, 3, H, W) on the device."""

    def _extract(self, images: np.ndarray) -> Features:
        chunk = self.CPU_CHUNK if self.device.type == "cpu" else len(images)
        parts = [self._chunk(images[start : start + chunk]) for start in range(0, len(images), chunk)]
        return {tap: np.concatenate([part[tap] for part in parts]) for tap in self.taps}

    @torch.inference_mode()
    def _chunk(self, images: np.ndarray) -> Features:
        pixels = torch.from_numpy(np.array(images)).to(self.device)  # (B, H, W, 3), a copy: the source may be read-only
        with full_precision(self.device):
            found = self.forward(pixels.permute(0, 3, 1, 2))
        return {tap: found[tap].float().cpu().numpy() for tap in self.taps}


def open_extractor(spec: str, device: str | torch.device = "cpu", weights: str = "") -> Extractor:
    """The extractor that `evaluate.extractor` names, with its weights loaded.

    Args:
        spec: `efflite0`, `inception`, or `module:attribute` (a torch module, or a function that returns one).
        device: torch device to run on.
        weights: `evaluate.weights`, the weights file of `inception`; empty looks where torch's hub keeps downloads.

    Raises:
        ConfigError: no extractor has this name, or the attribute cannot be imported.
        MissingError: its weights are not installed, or not the known ones.
    """
    if ":" in spec:
        from diffussm.evaluate.custom import CustomExtractor

        return CustomExtractor(spec, device)
    if spec == "efflite0":
        from diffussm.evaluate.efflite0 import EffLite0

        return EffLite0(device)
    if spec == "inception":
        from diffussm.evaluate.inception import Inception

        return Inception(Path(weights) if weights else None, device)
    raise ConfigError(
        f"evaluate.extractor: found {spec!r}; allowed: efflite0, inception, or module:attribute",
        "set evaluate.extractor=efflite0",
    )


def read_weights(path: Path, sha256: str, remedy: str) -> dict[str, Tensor]:
    """A state dict from a torch file whose digest is known.

    Raises:
        MissingError: no such file, or its SHA-256 is another.
    """
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise MissingError(f"{path}: {error.strerror or error}", remedy) from error
    if found != sha256:
        raise MissingError(f"{path}: found SHA-256 {found}, the known weights have {sha256}", remedy)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Convolutions in float32 proper: TF32, cuDNN's default, would make a GPU's features differ from a CPU's."""
    if device.type == "cuda":
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return contextlib.nullcontext()
