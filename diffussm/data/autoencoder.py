"""The frozen autoencoder between pictures and latents: the door to diffusers' AutoencoderKL.

Pictures are uint8 (B, H, W, 3). Latents are float32 (B, C, h, w) with h = H / downsampling, already shifted and scaled
to about unit variance: z = (z_vae - shift) * scaling_factor.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from diffussm.errors import DataError

BUILTIN = "builtin:"
BUILTIN_FOLDER = Path(__file__).parent / "weights"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class Autoencoder:
    """A frozen KL autoencoder on one device.

    Attributes:
        spec: what it was loaded from, as in `data.autoencoder`.
        digest: SHA-256 over config and weights files; equal digests mean equal latents.
        downsampling: picture side over latent side.
        channels: latent channels C.
        scaling_factor: factor that brings latents to about unit variance.
        shift: value taken off before scaling.
    """

    def __init__(self, network: Any, spec: str, digest: str) -> None:
        self._network = network.eval().requires_grad_(False)
        config = network.config
        self.spec = spec
        self.digest = digest
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self.channels = int(config.latent_channels)
        self.scaling_factor = float(config.scaling_factor)
        self.shift = float(config.shift_factor or 0.0)

    @property
    def network(self) -> Any:
        """diffusers' network itself."""
        return self._network

    def to(self, device: torch.device | str) -> Autoencoder:
        """Move the network to `device`; returns self."""
        self._network.to(device)
        return self

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self._network.parameters())

    @torch.no_grad()
    def encode(self, pictures: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """Posterior of each picture.

        Args:
            pictures: (B, H, W, 3) uint8; H and W are multiples of `downsampling`.

        Returns:
            Mean and standard deviation, each float32 (B, C, h, w) on the network's device, scaled.

        Raises:
            DataError: wrong shape or side, or latents that are not finite.
        """
        if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8:
            raise DataError(
                f"autoencoder: found pictures {pictures.shape} of {pictures.dtype}; allowed are (B, H, W, 3) of uint8"
            )
        if pictures.shape[1] % self.downsampling or pictures.shape[2] % self.downsampling:
            raise DataError(
                f"data.resolution_px: found {pictures.shape[1]} x {pictures.shape[2]}; "
                f"{self.spec} takes multiples of {self.downsampling}",
                f"set data.resolution_px to a multiple of {self.downsampling}",
            )
        # A copy: pictures may be read-only, as Pillow hands them out.
        x = torch.tensor(pictures, device=self._device).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
        posterior = self._network.encode(x.contiguous()).latent_dist
        mean = (posterior.mean - self.shift) * self.scaling_factor  # (B, C, h, w)
        std = posterior.std * self.scaling_factor  # (B, C, h, w)
        if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise DataError(
                f"data.autoencoder: {self.spec} gives latents that are not finite",
                "use weights that are safe in this precision",
            )
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> npt.NDArray[np.uint8]:
        """Pictures (B, H, W, 3) uint8 of scaled latents (B, C, h, w): clamp(127.5 x + 128, 0, 255), truncated."""
        z = latents.to(self._device, torch.float32) / self.scaling_factor + self.shift  # (B, C, h, w)
        x = self._network.decode(z).sample  # (B, 3, H, W)
        pictures: npt.NDArray[np.uint8] = (
            (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        )
        return pictures

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._network.parameters()).device
        return device


def load(spec: str) -> Autoencoder:
    """Load an autoencoder in float32 on the CPU.

    Args:
        spec: `builtin:NAME` (weights in the package), a folder as diffusers writes it, or an id on Hugging Face's hub.

    Raises:
        DataError: no such built-in, a folder that lacks a file, or weights that do not fit their config.
    """
    folder = resolve(spec)
    from diffusers import AutoencoderKL

    try:
        network = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(
            f"data.autoencoder: {spec} cannot be loaded ({error})", "name a folder of a diffusers AutoencoderKL"
        ) from error
    # Convolutions on the CPU are a third faster with channels last.
    return Autoencoder(network.to(memory_format=torch.channels_last), spec, _digest(folder))


def digest(spec: str) -> str:
    """SHA-256 of an autoencoder's files, without loading it; raises DataError as `load` does."""
    return _digest(resolve(spec))


def resolve(spec: str) -> Path:
    """Local folder that holds config and weights of `spec`; fetches them when `spec` is a hub id."""
    if spec.startswith(BUILTIN):
        names = sorted(p.name for p in BUILTIN_FOLDER.iterdir() if p.is_dir())
        if spec.removeprefix(BUILTIN) not in names:
            raise DataError(
                f"data.autoencoder: found {spec!r}; built in are {', '.join(BUILTIN + name for name in names)}",
                "take one of these, or name a folder or hub id",
            )
        folder = BUILTIN_FOLDER / spec.removeprefix(BUILTIN)
    elif Path(spec).is_dir():
        folder = Path(spec)
    else:
        folder = _fetch(spec)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise DataError(
                f"data.autoencoder: {folder} lacks {name}; an autoencoder is {CONFIG_FILE} with {WEIGHTS_FILE}",
                "name the folder that holds both files",
            )
    return folder


def write(network: nn.Module, folder: Path) -> None:
    """Write a diffusers network to `folder`; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        network.save_pretrained(scratch, safe_serialization=True)  # type: ignore[operator]
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            (scratch / name).chmod(0o644)
            (scratch / name).replace(folder / name)
    finally:
        shutil.rmtree(scratch)


def _fetch(spec: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"data.autoencoder: found {spec!r}, which is no folder here and cannot be fetched ({type(error).__name__})",
            "name builtin:emoji-32, a local folder, or a hub id while the hub can be reached",
        ) from error


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        total.update((folder / name).read_bytes())
    return total.hexdigest()
