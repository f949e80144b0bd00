"""The formula as a textbook writes it: the yardstick of speed. Used by the benchmark and by tests, never by the model.

`exp(dt A * arange(L))` is a (D, N/2, L) complex tensor for each direction, and each direction is convolved by an FFT
padded to 2L, the backward one over flipped input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffussm.ops.params import SSMParams, is_shared


def kernel(params: SSMParams, length: int) -> Tensor:
    """(D, length) kernel without the skip, in the parameters' dtype."""
    a = torch.complex(-params.log_a_real.exp(), params.a_imag)  # (D, N/2)
    dt_a = params.log_dt.exp()[:, None] * a  # (D, N/2)
    weight = torch.view_as_complex(params.c) * torch.view_as_complex(params.b) * (dt_a.exp() - 1) / a  # (D, N/2)
    steps = torch.arange(length, device=a.device)  # (L,)
    return 2 * torch.einsum("dn,dnl->dl", weight, torch.exp(dt_a[..., None] * steps)).real


def convolution(x: Tensor, k: Tensor) -> Tensor:
    """Causal convolution of x (B, D, L) with k (D, L) by FFTs of length 2L."""
    n = 2 * x.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(x, n=n) * torch.fft.rfft(k, n=n), n=n)[..., : x.shape[-1]]


def bidirectional_conv(u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
    """y (B, L, 2D) from u (B, L, D) or (B, L, 2D) and the kernels (D, L); autograd does the rest."""
    x_f, x_b = _inputs(u, k_f.shape[0])
    y_b = convolution(x_b.flip(-1), k_b).flip(-1)
    return torch.cat((convolution(x_f, k_f), y_b), dim=1).transpose(1, 2).to(u.dtype)


def bidirectional_ssm(u: Tensor, forward: SSMParams, backward: SSMParams) -> Tensor:
    """y (B, L, 2D) from u (B, L, D) or (B, L, 2D) and the parameters; autograd does the rest."""
    x_f, x_b = _inputs(u, forward.channels)
    y_f = convolution(x_f, kernel(forward, u.shape[1])) + forward.skip[:, None] * x_f
    x_b = x_b.flip(-1)
    y_b = (convolution(x_b, kernel(backward, u.shape[1])) + backward.skip[:, None] * x_b).flip(-1)
    return torch.cat((y_f, y_b), dim=1).transpose(1, 2).to(u.dtype)


def _inputs(u: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """(B, D, L) for each direction, at least fp32: torch's FFT takes no bf16."""
    x = u.transpose(1, 2)
    x = x if x.dtype == torch.float64 else x.float()
    return (x, x) if is_shared(u, channels) else (x[:, :channels], x[:, channels:])
