"""Parameters of one direction of the operator, and the two layouts of its input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SSMParams(NamedTuple):
    """Diagonal state-space models of one direction, one for each of D channels, N/2 conjugate pairs of states each.

    With `A_n = -exp(log_a_real) + i a_imag` and `dt = exp(log_dt)`, zero-order hold gives the convolution kernel
    `k[l] = 2 Re sum_n C_n B_n (exp(dt A_n) - 1)/A_n exp(l dt A_n)` (S4D, arXiv 2206.11893, equation 5); the skip is
    added at l = 0. fp32 in training; float64 is accepted for checking gradients.
    """

    log_dt: Tensor
    """(D,) logarithm of the step."""
    log_a_real: Tensor
    """(D, N/2) logarithm of minus the real part of A: the real part stays negative."""
    a_imag: Tensor
    """(D, N/2) imaginary part of A."""
    b: Tensor
    """(D, N/2, 2) real and imaginary part of B."""
    c: Tensor
    """(D, N/2, 2) real and imaginary part of C."""
    skip: Tensor
    """(D,) weight of the input itself."""

    @property
    def channels(self) -> int:
        """D."""
        return self.log_dt.shape[0]


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors has it, else float32: the operator never computes in a lower precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def is_shared(u: Tensor, channels: int) -> bool:
    """Whether both directions read the same input: u (B, L, D) rather than (B, L, 2D)."""
    return u.shape[2] == channels


def join_directions(du_f: Tensor, du_b: Tensor, shared: bool) -> Tensor:
    """Gradient of u from the gradients of what each direction read, (B, L, D) each: summed if shared, else joined."""
    return du_f + du_b if shared else torch.cat((du_f, du_b), dim=2)
