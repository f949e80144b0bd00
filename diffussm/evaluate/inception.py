"""The Inception-v3 of 2015 that FID is defined by, run from the ported weights file, with the tap of sFID.

The network is TensorFlow's of 2015-12-05 (Szegedy et al., arXiv 1512.00567), not torchvision's: its average pools leave
the padding out of the mean, its last block pools by maximum, it has 1008 classes and its own bilinear resize, which
starts at the corner of the first pixel. File layout: `<unit>.conv.weight`, `<unit>.bn.{weight, bias, running_mean,
running_var}` and `fc.{weight, bias}`, as in pytorch-fid's and torch-fidelity's releases (one and the same file).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from diffussm.errors import MissingError
from diffussm.evaluate.extractors import LOGITS, POOL, SPATIAL, NetworkExtractor, read_weights

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
"""What pytorch-fid and torch-fidelity call the file."""

_SIDE = 299
_CLASSES = 1008
_SPATIAL_CHANNELS = 7
_EPS = 1e-3
_PREPROCESSING = "tf1 bilinear 299; (uint8 - 128) / 128; pool, Mixed_6d.branch1x1[:7] NHWC, logits without bias"


class Inception(NetworkExtractor):
    """ADM's evaluation features: FID (pool, 2048), sFID (spatial, 2023) and IS (1008 logits without bias).

    Args:
        weights: the weights file; None looks into the folder where torch's hub keeps downloads.
        device: torch device to run on.
        sha256: digest that the file must have; another one than the default is for tests of the network itself.

    Raises:
        MissingError: the file is not there, is not the known one, or lacks a tensor.
    """

    name = "inception"
    metric_names = {  # noqa: RUF012 - a constant of the class, as the base declares it
        "frechet": "FID",
        "spatial": "sFID",
        "kernel": "KID",
        "inception": "IS",
        "precision": "precision",
        "recall": "recall",
    }
    taps = {POOL: 2048, SPATIAL: 17 * 17 * _SPATIAL_CHANNELS, LOGITS: _CLASSES}  # noqa: RUF012

    def __init__(self, weights: Path | None = None, device: str | torch.device = "cpu", sha256: str = SHA256) -> None:
        super().__init__(device)
        path = weights or _in_hub_folder()
        remedy = (
            f"fetch {FILES[0]} (pytorch-fid's release fid_weights on GitHub) and set evaluate.weights to its path, "
            "or set evaluate.extractor=efflite0"
        )
        state = read_weights(path, sha256, remedy)
        self.network = Network()
        try:
            self.network.read(state)
        except (KeyError, RuntimeError) as error:
            raise MissingError(f"{path}: is not in the layout of the FID weights ({error})", remedy) from error
        self.network.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.digest = hashlib.sha256(f"{sha256}|{_PREPROCESSING}".encode()).hexdigest()[:16]

    @override
    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = resize_like_tensorflow(pixels.float(), _SIDE)  # (B, 3, 299, 299)
        pool, tap = self.network((x - 128) / 128)  # (B, 2048), (B, 192, 17, 17)
        spatial = tap[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 2023): row, column, channel
        return {POOL: pool, SPATIAL: spatial, LOGITS: pool @ self.network.fc.weight.T}


def resize_like_tensorflow(x: Tensor, side: int) -> Tensor:
    """Bilinear resize of (B, C, H, W) to (B, C, side, side) as TensorFlow 1 did it.

    Output pixel i samples position i * H / side: corners of pixels, not their centres, are aligned at the first row
    and column, and nothing is smoothed first.
    """

    def along(size: int) -> tuple[Tensor, Tensor, Tensor]:
        position = torch.arange(side, dtype=torch.float32, device=x.device) * torch.tensor(size / side)  # (side,)
        low = position.long()
        return low, (low + 1).clamp_max(size - 1), position - low

    top, bottom, down = along(x.shape[2])
    left, right, across = along(x.shape[3])
    down = down[:, None]  # (side, 1)

    def row(index: Tensor) -> Tensor:
        line = x.index_select(2, index)  # (B, C, side, W)
        start = line.index_select(3, left)  # (B, C, side, side)
        return start + (line.index_select(3, right) - start) * across

    upper = row(top)  # (B, C, side, side)
    return upper + (row(bottom) - upper) * down


class _Unit(nn.Module):
    """Convolution, its batch norm folded in, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int], stride: int, pad: bool) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding)

    def read(self, state: dict[str, Tensor], name: str) -> None:
        """Take weights and frozen batch norm from a state dict; both scale and shift go into the convolution."""
        scale = state[f"{name}.bn.weight"] * torch.rsqrt(state[f"{name}.bn.running_var"] + _EPS)  # (c_out,)
        shift = state[f"{name}.bn.bias"] - state[f"{name}.bn.running_mean"] * scale  # (c_out,)
        weight = state[f"{name}.conv.weight"] * scale[:, None, None, None]  # (c_out, c_in, h, w)
        self.conv.load_state_dict({"weight": weight, "bias": shift})

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.conv(x))


class _Spec(NamedTuple):
    """One unit of a branch: its name, channels, kernel and stride."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


Branch = Sequence[_Spec | tuple[_Spec, _Spec]]
"""Units one after another; a pair at the end runs side by side and is concatenated."""


class _Mixed(nn.Module):
    """Branches side by side and one that pools first, concatenated along the channels."""

    def __init__(self, c_in: int, branches: Sequence[Branch], pool: str, pooled: int) -> None:
        super().__init__()
        self.branches, self.pool = branches, pool
        for branch in branches:
            channels = c_in
            for step in branch:
                for spec in _specs(step):
                    # Inside these blocks a unit keeps the size, unless it strides.
                    self.add_module(
                        spec.name, _Unit(channels, spec.channels, spec.kernel, spec.stride, pad=spec.stride == 1)
                    )
                channels = _specs(step)[0].channels
        if pooled:
            self.branch_pool = _Unit(c_in, pooled, (1, 1), 1, pad=False)

    def forward(self, x: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                y = torch.cat([self.get_submodule(spec.name)(y) for spec in _specs(step)], dim=1)
            outputs.append(y)
        if taps is not None:
            taps[self.branches[0][0].name] = outputs[0]  # type: ignore[union-attr]
        outputs.append(self._pooled(x))
        return torch.cat(outputs, dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "strided":
            return functional.max_pool2d(x, 3, 2)
        if self.pool == "max":
            return self.branch_pool(functional.max_pool2d(x, 3, 1, padding=1))
        return self.branch_pool(functional.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False))


def _specs(step: _Spec | tuple[_Spec, _Spec]) -> tuple[_Spec, ...]:
    return (step,) if isinstance(step, _Spec) else step


def _chain(prefix: str, *units: tuple[int, tuple[int, int]], stride: int = 1) -> list[_Spec]:
    """`prefix`_1, `prefix`_2, ... of (channels, kernel); the last one has the stride."""
    last = len(units)
    return [_Spec(f"{prefix}_{i}", c, k, stride if i == last else 1) for i, (c, k) in enumerate(units, 1)]


def _a(c_in: int, pooled: int) -> _Mixed:
    one, three, five = (1, 1), (3, 3), (5, 5)
    return _Mixed(
        c_in,
        [
            [_Spec("branch1x1", 64)],
            _chain("branch5x5", (48, one), (64, five)),
            _chain("branch3x3dbl", (64, one), (96, three), (96, three)),
        ],
        "mean",
        pooled,
    )


def _b(c_in: int) -> _Mixed:
    doubled = _chain("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)), stride=2)
    return _Mixed(c_in, [[_Spec("branch3x3", 384, (3, 3), 2)], doubled], "strided", 0)


def _c(c_in: int, c7: int) -> _Mixed:
    one, wide, tall = (1, 1), (1, 7), (7, 1)
    return _Mixed(
        c_in,
        [
            [_Spec("branch1x1", 192)],
            _chain("branch7x7", (c7, one), (c7, wide), (192, tall)),
            _chain("branch7x7dbl", (c7, one), (c7, tall), (c7, wide), (c7, tall), (192, wide)),
        ],
        "mean",
        192,
    )


def _d(c_in: int) -> _Mixed:
    sevens = _chain("branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3)), stride=2)
    return _Mixed(c_in, [_chain("branch3x3", (192, (1, 1)), (320, (3, 3)), stride=2), sevens], "strided", 0)


def _e(c_in: int, pool: str) -> _Mixed:
    def fork(name: str) -> tuple[_Spec, _Spec]:
        return _Spec(f"{name}a", 384, (1, 3)), _Spec(f"{name}b", 384, (3, 1))

    return _Mixed(
        c_in,
        [
            [_Spec("branch1x1", 320)],
            [_Spec("branch3x3_1", 384), fork("branch3x3_2")],
            [_Spec("branch3x3dbl_1", 448), _Spec("branch3x3dbl_2", 384, (3, 3)), fork("branch3x3dbl_3")],
        ],
        pool,
        192,
    )


class Network(nn.Module):
    """(B, 3, 299, 299) -> pooled features (B, 2048) and the map of Mixed_6d.branch1x1 (B, 192, 17, 17)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Unit(3, 32, (3, 3), 2, pad=False)
        self.Conv2d_2a_3x3 = _Unit(32, 32, (3, 3), 1, pad=False)
        self.Conv2d_2b_3x3 = _Unit(32, 64, (3, 3), 1, pad=True)
        self.Conv2d_3b_1x1 = _Unit(64, 80, (1, 1), 1, pad=False)
        self.Conv2d_4a_3x3 = _Unit(80, 192, (3, 3), 1, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_c(768, c7) for c7 in (128, 160, 160, 192))
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, "mean"), _e(2048, "max")
        self.fc = nn.Linear(2048, _CLASSES)

    def read(self, state: dict[str, Tensor]) -> None:
        """Take the weights of a file in the known layout. Raises KeyError, RuntimeError if it is another."""
        known = {"fc.weight", "fc.bias"}
        for name, unit in self._units():
            unit.read(state, name)
            known |= {f"{name}.conv.weight", *(f"{name}.bn.{x}" for x in ("weight", "bias"))}
            known |= {f"{name}.bn.{x}" for x in ("running_mean", "running_var", "num_batches_tracked")}
        self.fc.load_state_dict({"weight": state["fc.weight"], "bias": state["fc.bias"]})
        if unknown := state.keys() - known:
            raise KeyError(f"unknown tensor {min(unknown)}")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, 299, 299), from -1 to 1; see the class."""
        taps: dict[str, Tensor] = {}
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = functional.max_pool2d(x, 3, 2)  # (B, 64, 73, 73)
        x = functional.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)  # (B, 192, 35, 35)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))  # (B, 768, 17, 17)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)), taps)  # (B, 768, 17, 17)
        x = self.Mixed_7a(self.Mixed_6e(x))  # (B, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))  # (B, 2048, 8, 8)
        return x.mean((2, 3)), taps["branch1x1"]

    def _units(self) -> Iterator[tuple[str, _Unit]]:
        return ((name, module) for name, module in self.named_modules() if isinstance(module, _Unit))


def _in_hub_folder() -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return next((folder / name for name in FILES if (folder / name).is_file()), folder / FILES[0])
