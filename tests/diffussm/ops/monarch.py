"""The CUDA source on a CPU: compiled by g++ against cuda_shim.cpp and called through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from diffussm.ops import cuda_nvrtc
from diffussm.ops.cuda_tables import constants, spectra

SHIM = Path(__file__).with_name("cuda_shim.cpp")
COMPILER = shutil.which("g++") or shutil.which("c++")


def build(folder: Path, subs: int, dtype: torch.dtype, source: str | None = None) -> ctypes.CDLL:
    """`monarch` for `subs` and a half-precision dtype as a shared library; `source` stands in for the real text."""
    assert COMPILER is not None
    text = folder / f"monarch-{subs}-{dtype}.cu"
    text.write_text(cuda_nvrtc.source() if source is None else source)
    library = text.with_suffix(".so")
    options = ["-O1", "-shared", "-fPIC", "-w", f"-DSUBS={subs}", f"-DBF16={int(dtype == torch.bfloat16)}"]
    command = [COMPILER, *options, f'-DSOURCE="{text}"', str(SHIM), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def convolve(library: ctypes.CDLL, subs: int, u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
    """y (B, L, 2D) as the backend launches it; what the kernel leaves unwritten is not-a-number."""
    channels = k_f.shape[0]
    y = torch.full((u.shape[0], u.shape[1], 2 * channels), float("nan"), dtype=u.dtype)
    pairs, gain = spectra(k_f, k_b, subs)
    table = constants(subs)
    step = 0 if u.shape[2] == channels else channels * u.stride(2)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (u, y, pairs, gain, table)]
    library.run(*pointers, u.shape[0], u.shape[1], channels, step, *u.stride())
    return y
