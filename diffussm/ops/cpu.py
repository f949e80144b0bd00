"""The operator in C++ for CPUs: LANES channels in a SIMD register, one fused transform of length L for each sequence.

The sources in `csrc` are compiled on first use (`build.py`). The right-angle transform (csrc/fft.h) needs no padding
to 2L; its stages are fused with reading, multiplying and writing, so u and y are touched once each. bf16 is read and
written as it is, fp16 is converted around the call; all arithmetic is fp32, and float64 where it sets the precision of
the kernels. Uses `torch.get_num_threads()` threads; results do not depend on their number.

There is no fused `ssm`: keeping two (D, L) kernels for the backward pass is cheaper than making them twice.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from diffussm.ops import build
from diffussm.ops.params import SSMParams, is_shared

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _ConvArgs(ctypes.Structure):
    """Mirror of ConvArgs in csrc/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("u", "dy", "k_f", "k_b", "y", "du", "dk_f", "dk_b")),
        *((name, ctypes.c_long) for name in ("u_batch", "u_row", "dy_batch", "dy_row", "batch", "length", "channels")),
        *((name, ctypes.c_int) for name in ("is_bf16", "shared", "threads")),
    )


class _KernelArgs(ctypes.Structure):
    """Mirror of KernelArgs in csrc/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in SSMParams._fields),
        ("k", ctypes.c_void_p),
        *((f"d_{name}", ctypes.c_void_p) for name in SSMParams._fields),
        *((name, ctypes.c_long) for name in ("length", "channels", "states")),
        *((name, ctypes.c_int) for name in ("threads",)),
    )


class CpuBackend:
    """Compiled for this processor on first use; refuses where there is no compiler."""

    name = "cpu"

    def available(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None where it can run, else why not. Builds the library when nobody has yet."""
        if device.type != "cpu":
            return f"it runs on the CPU only, not on {device.type}"
        if dtype not in _DTYPES:
            return f"{dtype} is none of {', '.join(str(d) for d in _DTYPES)}"
        try:
            _library()
        except build.BuildError as error:
            return str(error)
        return None

    def kernel(self, params: SSMParams, length: int) -> Tensor:
        """(D, length) kernels with the skip at l = 0, in the parameters' dtype."""
        return _kernel(params, length).to(params.c.dtype)

    def kernel_backward(self, dk: Tensor, params: SSMParams) -> SSMParams:
        """Gradients of the parameters from dk (D, L)."""
        return _kernel_backward(_float(dk), params, dk.shape[1])

    def conv(self, u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
        """y (B, L, 2D) from u (B, L, D) or (B, L, 2D) and the kernels (D, L)."""
        return _conv(u, _float(k_f), _float(k_b), k_f.shape[0])

    def conv_backward(self, dy: Tensor, u: Tensor, k_f: Tensor, k_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """du like u, dk_f and dk_b (D, L), from dy (B, L, 2D). The transform of u is made again, not kept."""
        du, dk_f, dk_b = _conv_backward(dy, u, _float(k_f), _float(k_b), k_f.shape[0])
        return du, dk_f.to(k_f.dtype), dk_b.to(k_b.dtype)


@functools.cache
def _library() -> ctypes.CDLL:
    library = build.load_library()
    for function in (library.diffussm_conv, library.diffussm_kernel):
        function.argtypes = (ctypes.c_void_p, ctypes.c_int)
        function.restype = None
    return library


def _float(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _rows(x: Tensor) -> Tensor:
    """x (B, L, C) as the library reads it: fp32 or bf16, neighbouring channels side by side, any other strides."""
    x = x.float() if x.dtype == torch.float16 else x
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _kernel_args(params: list[Tensor], k: Tensor, length: int) -> _KernelArgs:
    channels, states = params[1].shape
    args = _KernelArgs(k=k.data_ptr(), length=length, channels=channels, states=states, threads=torch.get_num_threads())
    for name, value in zip(SSMParams._fields, params, strict=True):
        setattr(args, name, value.data_ptr())
    return args


def _kernel(params: SSMParams, length: int) -> Tensor:
    values = [_float(p) for p in params]
    k = torch.empty(params.channels, length)
    _library().diffussm_kernel(ctypes.byref(_kernel_args(values, k, length)), 0)
    return k


def _kernel_backward(dk: Tensor, params: SSMParams, length: int) -> SSMParams:
    values = [_float(p) for p in params]
    grads = [torch.empty_like(p) for p in values]
    args = _kernel_args(values, dk, length)
    for name, grad in zip(SSMParams._fields, grads, strict=True):
        setattr(args, f"d_{name}", grad.data_ptr())
    _library().diffussm_kernel(ctypes.byref(args), 1)
    return SSMParams(*(g.to(p.dtype) for g, p in zip(grads, params, strict=True)))


def _conv_args(u: Tensor, k_f: Tensor, k_b: Tensor, channels: int) -> _ConvArgs:
    return _ConvArgs(
        u=u.data_ptr(),
        k_f=k_f.data_ptr(),
        k_b=k_b.data_ptr(),
        u_batch=u.stride(0),
        u_row=u.stride(1),
        batch=u.shape[0],
        length=u.shape[1],
        channels=channels,
        is_bf16=u.dtype == torch.bfloat16,
        shared=is_shared(u, channels),
        threads=torch.get_num_threads(),
    )


def _conv(u: Tensor, k_f: Tensor, k_b: Tensor, channels: int) -> Tensor:
    rows = _rows(u)
    y = rows.new_empty(u.shape[0], u.shape[1], 2 * channels)
    args = _conv_args(rows, k_f, k_b, channels)
    args.y = y.data_ptr()
    _library().diffussm_conv(ctypes.byref(args), 0)
    return y.to(u.dtype)


def _conv_backward(dy: Tensor, u: Tensor, k_f: Tensor, k_b: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, dy_rows = _rows(u), _rows(dy.to(u.dtype))
    du = rows.new_empty(u.shape)
    dk_f, dk_b = torch.empty_like(k_f), torch.empty_like(k_b)
    args = _conv_args(rows, k_f, k_b, channels)
    args.dy, args.du, args.dk_f, args.dk_b = dy_rows.data_ptr(), du.data_ptr(), dk_f.data_ptr(), dk_b.data_ptr()
    args.dy_batch, args.dy_row = dy_rows.stride(0), dy_rows.stride(1)
    _library().diffussm_conv(ctypes.byref(args), 1)
    return du.to(u.dtype), dk_f, dk_b


BACKEND = CpuBackend()
