"""Convolution with known kernels on tensor cores, for sampling: Monarch transform compiled on the spot by NVRTC.

Half precision, sequences up to 4096. The kernels' transforms are made once and kept as long as the kernels live and
stay unchanged: a sampling step reads u and the transforms and writes y. Gradients, kernel generation and other lengths
go through the torch backend.
"""

from __future__ import annotations

import importlib.util
import weakref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from diffussm.errors import DiffuSSMError
from diffussm.ops import parity
from diffussm.ops.cuda_nvrtc import Kernel
from diffussm.ops.cuda_tables import SIDE, constants, spectra
from diffussm.ops.params import is_shared
from diffussm.ops.torch import BACKEND as TORCH
from diffussm.ops.torch import TorchBackend

MAX_LENGTH = 4 * SIDE**2
_DTYPES = (torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)
_MAX_GRID = 65535
_INT_MAX = 2**31 - 1


class CudaBackend(TorchBackend):
    """Monarch convolution on CUDA cards of compute capability 8.0 and above, for bfloat16 and float16."""

    name = "cuda"

    def __init__(self) -> None:
        self._kernels: dict[tuple[int, bool, int], Kernel] = {}
        self._constants: dict[tuple[int, torch.device], Tensor] = {}
        self._spectra = SpectrumCache()

    def available(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if it runs there and gives right results at its long length; else the reason why not."""
        if dtype not in _DTYPES:
            return f"dtype {dtype} is not one of bfloat16 and float16"
        if device.type != "cuda":
            return f"it needs a CUDA device, not {device.type}"
        if torch.version.cuda is None:
            return "this torch was not built for CUDA"
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
            return "the package cuda-bindings is not installed"
        return self._check_long(device, dtype)

    def conv(self, u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
        """y (B, L, 2D) from u (B, L, D) or (B, L, 2D) of any strides and the kernels (D, L)."""
        if not served(u):
            return super().conv(u, k_f, k_b)
        batch, length = u.shape[0], u.shape[1]
        channels = k_f.shape[0]
        subs = subsequences(length)
        pairs, gain = self._spectra.get(k_f, k_b, subs)
        y = u.new_empty(batch, length, 2 * channels)
        step = 0 if is_shared(u, channels) else channels * u.stride(2)
        with torch.cuda.device(u.device):
            self._kernel(subs, u.dtype == torch.bfloat16, u.device).launch(
                (-(-channels // 8), 2, batch),
                torch.cuda.current_stream().cuda_stream,
                [u.data_ptr(), y.data_ptr(), pairs.data_ptr(), gain.data_ptr(), self._table(subs, u.device).data_ptr()],
                [length, channels, step, *u.stride()],
            )
        return y

    def _kernel(self, subs: int, bf16: bool, device: torch.device) -> Kernel:
        index = torch.cuda.current_device()
        key = (subs, bf16, index)
        if key not in self._kernels:
            major, minor = torch.cuda.get_device_capability(device)
            self._kernels[key] = Kernel(subs, bf16, f"sm_{major}{minor}")
        return self._kernels[key]

    def _table(self, subs: int, device: torch.device) -> Tensor:
        key = (subs, device)
        if key not in self._constants:
            self._constants[key] = constants(subs).to(device)
        return self._constants[key]

    def _check_long(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """The general parity check is short; this one sends 1024 and 4096 points through, against float64."""
        for length in (SIDE**2, MAX_LENGTH):
            u, forward, backward = parity.example(2, length, 9, 8, device, dtype, shared=False)
            k_f, k_b = TORCH.kernel(forward, length), TORCH.kernel(backward, length)
            try:
                found = self.conv(u, k_f, k_b)
            except (DiffuSSMError, RuntimeError, ImportError, OSError, TypeError, ValueError) as error:
                return f"it raised {type(error).__name__} at length {length}: {str(error).splitlines()[0]}"
            off = parity.relative_error(found, TORCH.conv(u.double(), k_f.double(), k_b.double()))
            if off > parity.tolerance(dtype)[0]:
                return f"parity check failed: y is off by {off:.2g} (relative L2) at length {length}"
        return None


class SpectrumCache:
    """Transforms of kernel pairs, kept by identity and version: gone with the kernel, made anew when it changes."""

    def __init__(self) -> None:
        self._entries = WeakTensorKeyDictionary()

    def get(self, k_f: Tensor, k_b: Tensor, subs: int) -> tuple[Tensor, Tensor]:
        """`spectra(k_f, k_b, subs)`, from the cache where neither kernel was written to since.

        Kernels made in inference mode carry no version: a change could not be seen, so they are never kept.
        """
        if k_f.is_inference() or k_b.is_inference():
            return spectra(k_f, k_b, subs)
        stamp = (k_f._version, k_b._version, k_f.data_ptr(), k_b.data_ptr(), subs)
        entry = self._entries.get(k_f)
        # An address may be used again by another tensor: only the object itself, still alive, is the same kernel.
        if entry is not None and entry[0]() is k_b and entry[1] == stamp:
            return entry[2]
        result = spectra(k_f, k_b, subs)
        self._entries[k_f] = (weakref.ref(k_b), stamp, result)
        return result

    def __len__(self) -> int:
        return len(self._entries)


def subsequences(length: int) -> int:
    """Residues that the transform splits a sequence into: 1 up to 1024 points, 4 up to 4096."""
    return 1 if length <= SIDE**2 else 4


def served(u: Tensor) -> bool:
    """Whether the CUDA kernel takes u (B, L, C): dtype, length, grid limits, 32-bit strides."""
    return (
        u.dtype in _DTYPES
        and u.shape[1] <= MAX_LENGTH
        and 0 < u.shape[0] <= _MAX_GRID
        and max(*u.stride(), u.stride(2) * u.shape[2]) <= _INT_MAX
    )


BACKEND = CudaBackend()
