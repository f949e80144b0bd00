"""The frozen autoencoder between pictures and latents: the door to diffusers' AutoencoderKL, -Tiny and -DC.

Pictures are uint8 (B, H, W, 3). Latents are float32 (B, C, h, w) with h = H / downsampling, already shifted and scaled
to about unit variance: z = (z_vae - shift) * scaling_factor, or, where the autoencoder states mean and deviation of
each channel, z = (z_vae - latents_mean) / latents_std * scaling_factor.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from diffussm.errors import DataError

BUILTIN = "builtin:"
BUILTIN_FOLDER = Path(__file__).parent / "weights"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
CLASSES: Final = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
"""Classes of diffusers that are read; the last two have no posterior, so their deviation is 0."""


@dataclass(frozen=True)
class Traits:
    """What an autoencoder's config says about its latents."""

    digest: str
    """SHA-256 over config and weights files."""
    downsampling: int
    """Picture side over latent side."""
    channels: int
    """Latent channels C."""
    scaling_factor: float
    """Factor that brings latents to about unit variance."""
    shift: float
    """Value taken off before scaling; 0 where each channel has its own."""
    latents_mean: tuple[float, ...]
    """Value taken off each channel, and"""
    latents_std: tuple[float, ...]
    """what each channel is divided by, where the autoencoder states both; else empty."""
    deterministic: bool
    """Whether the encoder gives a latent instead of a distribution."""


class Autoencoder:
    """A frozen autoencoder on one device.

    Attributes:
        spec: what it was loaded from, as in `data.autoencoder`.
        digest: SHA-256 over config and weights files; equal digests mean equal latents.
        downsampling: picture side over latent side.
        channels: latent channels C.
        scaling_factor: factor that brings latents to about unit variance.
        shift: value taken off before scaling; 0 where each channel has its own.
        deterministic: whether the encoder gives a latent instead of a distribution; deviations are 0 then.
        traits: all of these.
    """

    def __init__(self, network: Any, spec: str, digest: str) -> None:
        self._network = network.eval().requires_grad_(False)
        self.traits = traits = _traits(network.config, type(network).__name__, spec, digest)
        self.spec, self.digest = spec, digest
        self.downsampling, self.channels = traits.downsampling, traits.channels
        self.scaling_factor, self.shift = traits.scaling_factor, traits.shift
        self.deterministic = traits.deterministic
        by_channel = bool(traits.latents_std)
        shape = (1, self.channels if by_channel else 1, 1, 1)
        self._offset = torch.tensor(traits.latents_mean if by_channel else [self.shift]).view(shape)
        self._factor = self.scaling_factor / torch.tensor(traits.latents_std if by_channel else [1.0]).view(shape)

    @property
    def network(self) -> Any:
        """diffusers' network itself."""
        return self._network

    def to(self, device: torch.device | str) -> Autoencoder:
        """Move the network to `device`; returns self."""
        self._network.to(device)
        self._offset, self._factor = self._offset.to(device), self._factor.to(device)
        return self

    def in_precision(self, dtype: torch.dtype) -> Autoencoder:
        """Calculate in `dtype` from now on; latents stay float32. Returns self."""
        self._network.to(dtype)
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
        encoded = self._network.encode(x.contiguous().to(self._dtype))
        if self.deterministic:
            raw = (encoded.latents if hasattr(encoded, "latents") else encoded.latent).float()  # (B, C, h, w)
            deviation = torch.zeros_like(raw)
        else:
            raw, deviation = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
        mean = (raw - self._offset) * self._factor  # (B, C, h, w)
        std = deviation * self._factor  # (B, C, h, w)
        if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise DataError(
                f"data.autoencoder: {self.spec} gives latents that are not finite",
                "use weights that are safe in this precision, or data.encoder_precision=fp32",
            )
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> npt.NDArray[np.uint8]:
        """Pictures (B, H, W, 3) uint8 of scaled latents (B, C, h, w): clamp(127.5 x + 128, 0, 255), truncated."""
        z = latents.to(self._device, torch.float32) / self._factor + self._offset  # (B, C, h, w)
        x = self._network.decode(z.to(self._dtype)).sample.float()  # (B, 3, H, W)
        pictures: npt.NDArray[np.uint8] = (
            (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        )
        return pictures

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._network.parameters()).device
        return device

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self._network.parameters()).dtype
        return dtype


def _traits(config: Any, kind: str, spec: str, digest: str) -> Traits:
    """Traits from a config with all its keys; raises DataError when it contradicts itself."""
    mean = tuple(getattr(config, "latents_mean", None) or ())
    std = tuple(getattr(config, "latents_std", None) or ())
    channels = int(config.latent_channels)
    if len(mean) != len(std) or (std and (len(std) != channels or min(std) <= 0)):
        raise DataError(
            f"data.autoencoder: {spec} states latents_mean {mean} and latents_std {std}; allowed are {channels} values "
            "each, deviations above 0, or neither",
            "mend its config.json",
        )
    # One halving between two levels of the encoder.
    levels = getattr(config, "encoder_block_out_channels", None) or config.block_out_channels
    return Traits(
        digest=digest,
        downsampling=int(2 ** (len(levels) - 1)),
        channels=channels,
        scaling_factor=float(config.scaling_factor),
        shift=0.0 if std else float(getattr(config, "shift_factor", None) or 0.0),
        latents_mean=mean,
        latents_std=std,
        deterministic=kind in CLASSES[1:],
    )


def describe(spec: str) -> Traits:
    """Traits of an autoencoder without loading its weights; raises DataError as `load` does."""
    folder = resolve(spec)
    kind, config = _config(folder, spec)
    import diffusers

    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return _traits(SimpleNamespace(**(defaults | config)), kind, spec, _digest(folder))


def load(spec: str) -> Autoencoder:
    """Load an autoencoder in float32 on the CPU.

    Args:
        spec: `builtin:NAME` (weights in the package), a folder as diffusers writes it, or an id on Hugging Face's hub,
            with a sub-folder if need be (`owner/name/vae`).

    Raises:
        DataError: no such built-in, a folder that lacks a file, a class that is not read, or weights that do not fit
            their config.
    """
    folder = resolve(spec)
    kind, _ = _config(folder, spec)
    import diffusers

    try:
        network = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(
            f"data.autoencoder: {spec} cannot be loaded ({error})",
            f"name a folder of a diffusers {' or '.join(CLASSES)}",
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


def _config(folder: Path, spec: str) -> tuple[str, dict[str, Any]]:
    """Which of CLASSES the config names, and the config; old ones name none and are AutoencoderKL."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        kind = str(config.get("_class_name", CLASSES[0]))
    except (ValueError, AttributeError) as error:
        raise DataError(f"data.autoencoder: {folder / CONFIG_FILE} is no config ({error})", "fetch it again") from error
    if kind not in CLASSES:
        raise DataError(
            f"data.autoencoder: found {spec}, an {kind}; allowed are {', '.join(CLASSES)}", "name another autoencoder"
        )
    return kind, config


def _fetch(spec: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        owner, _, rest = spec.partition("/")
        name, _, below = rest.partition("/")
        repository = f"{owner}/{name}" if rest else owner
        wanted = [f"{below}/{file}" if below else file for file in (CONFIG_FILE, WEIGHTS_FILE)]
        return Path(snapshot_download(repository, allow_patterns=wanted)) / below
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
