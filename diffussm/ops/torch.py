"""The operator in plain torch: two-level kernels and one transform for both directions. Runs on every device.

Kernel. Splitting l = L0 l1 + l0 with L0 ~ sqrt(L) turns the sum over states into one batched real matrix product
K[l1, l0] = sum_r P[r, l1] Q[r, l0] over r = (Re, Im) x n, with Q = z^l0 and P = 2 w z^(L0 l1). It takes N/2 (L0 + L1)
exponentials a channel instead of N/2 L, and nothing of size D N L ever exists.

Convolution. The backward direction is the adjoint of a causal convolution, so in the frequency domain it is a product
with the conjugate transform. Zero padding to at least 2L - 1 keeps the lags apart. Products with explicit Toeplitz
matrices were no quicker on a CPU, not even at L = 64: their gradient moves too much memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffussm.ops.params import SSMParams, is_shared, work_dtype


class TorchBackend:
    """Two-level kernel, shared FFT; always there."""

    name = "torch"

    def available(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None: it runs wherever torch does."""
        return None

    def kernel(self, params: SSMParams, length: int) -> Tensor:
        """(D, length) kernels with the skip at l = 0, in the parameters' dtype (fp32 or float64)."""
        modes = _Modes(params)
        fine, coarse = _split(length)
        q_re, q_im = modes.powers(fine, 1)  # (D, N/2, L0) each
        p_re, p_im = modes.powers(coarse, fine)  # (D, N/2, L1) each
        w_re, w_im = 2 * modes.w.real[:, :, None], 2 * modes.w.imag[:, :, None]  # (D, N/2, 1)
        q = torch.cat((q_re, q_im), dim=1)  # (D, N, L0)
        p = torch.cat((w_re * p_re - w_im * p_im, -w_re * p_im - w_im * p_re), dim=1)  # (D, N, L1)
        with _ieee_products(q.device):
            k = torch.bmm(p.transpose(1, 2), q)  # (D, L1, L0)
        k = k.flatten(1)[:, :length].contiguous()  # (D, L)
        k[:, 0] += params.skip
        return k

    def kernel_backward(self, dk: Tensor, params: SSMParams) -> SSMParams:
        """Gradients of the parameters from dk (D, L)."""
        modes = _Modes(params)
        dk = dk.to(modes.lam_re.dtype)
        length = dk.shape[1]
        fine, coarse = _split(length)
        q_re, q_im = modes.powers(fine, 1)  # (D, N/2, L0)
        p_re, p_im = modes.powers(coarse, fine)  # (D, N/2, L1)
        grid = torch.nn.functional.pad(dk, (0, fine * coarse - length)).unflatten(1, (coarse, fine))  # (D, L1, L0)
        ramp = torch.arange(fine, device=dk.device, dtype=dk.dtype)  # (L0,)
        q = torch.cat((q_re, q_im, q_re * ramp, q_im * ramp), dim=1)  # (D, 2N, L0)
        with _ieee_products(q.device):
            sums = torch.bmm(q, grid.transpose(1, 2))  # (D, 2N, L1)
        t_re, t_im, r_re, r_im = sums.chunk(4, dim=1)  # (D, N/2, L1): sums over l0 without and with the weight l0
        steps = torch.arange(coarse, device=dk.device, dtype=dk.dtype) * fine  # (L1,)
        r_re, r_im = r_re + steps * t_re, r_im + steps * t_im
        # S0 = sum_l dk z^l and S1 = sum_l l dk z^l.
        s0 = torch.complex((p_re * t_re - p_im * t_im).sum(2), (p_re * t_im + p_im * t_re).sum(2))  # (D, N/2)
        s1 = torch.complex((p_re * r_re - p_im * r_im).sum(2), (p_re * r_im + p_im * r_re).sum(2))  # (D, N/2)
        return modes.chain(s0, s1, dk[:, 0])

    def conv(self, u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
        """y (B, L, 2D) from u (B, L, D) or (B, L, 2D) and the kernels (D, L)."""
        length, work = u.shape[1], work_dtype(u, k_f)
        n = _fft_length(length)
        fk = _kernel_transform(k_f.to(work), k_b.to(work), n)  # (2, D, F)
        fu = _transform(u, n, work, k_f.shape[0])  # (B, 1 or 2, D, F)
        y = torch.fft.irfft(fu * fk, n=n)[..., :length]  # (B, 2, D, L)
        return y.flatten(1, 2).transpose(1, 2).to(u.dtype).contiguous()

    def conv_backward(self, dy: Tensor, u: Tensor, k_f: Tensor, k_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """du like u, dk_f and dk_b (D, L), from dy (B, L, 2D). The transform of u is made again, not kept."""
        length, work = u.shape[1], work_dtype(u, k_f)
        n = _fft_length(length)
        fk = _kernel_transform(k_f.to(work), k_b.to(work), n)  # (2, D, F)
        fdy = _transform(dy, n, work, k_f.shape[0])  # (B, 2, D, F)
        fdu = fdy * fk.conj()  # (B, 2, D, F)
        if is_shared(u, k_f.shape[0]):
            fdu = fdu.sum(dim=1, keepdim=True)  # (B, 1, D, F)
        du = torch.fft.irfft(fdu, n=n)[..., :length].flatten(1, 2).transpose(1, 2)  # (B, L, C)
        fdk = (fdy * _transform(u, n, work, k_f.shape[0]).conj()).sum(dim=0)  # (2, D, F)
        dk_f = torch.fft.irfft(fdk[0], n=n)[:, :length]  # (D, L)
        dk_b = torch.fft.irfft(fdk[1].conj(), n=n)[:, :length]  # (D, L)
        return (
            du.to(u.dtype).contiguous(),
            dk_f.to(k_f.dtype).contiguous(),
            dk_b.to(k_b.dtype).contiguous(),
        )


class _Modes:
    """Everything of size (D, N/2) that kernel and gradients share, in the parameters' own precision."""

    def __init__(self, params: SSMParams) -> None:
        self.params = params
        self.dt = params.log_dt.exp()[:, None]  # (D, 1)
        a_re = -params.log_a_real.exp()
        self.a = torch.complex(a_re, params.a_imag)
        self.b = torch.view_as_complex(params.b.contiguous())
        self.c = torch.view_as_complex(params.c.contiguous())
        self.lam_re, self.lam_im = self.dt * a_re, self.dt * params.a_imag
        # exp(lam) - 1 without cancellation: |lam| is as small as 5e-4 and fp32 would lose four digits.
        expm1 = self.lam_re.expm1()
        shrink = 2 * (0.5 * self.lam_im).sin().square()  # 1 - cos
        z_re_minus_1 = expm1 * (1 - shrink) - shrink
        z_im = (expm1 + 1) * self.lam_im.sin()
        self.z = torch.complex(z_re_minus_1 + 1, z_im)
        self.hold = torch.complex(z_re_minus_1, z_im) / self.a
        self.w = self.b * self.c * self.hold

    def powers(self, count: int, stride: int) -> tuple[Tensor, Tensor]:
        """Real and imaginary part of z^(stride i) for i < count, (D, N/2, count) each."""
        steps = torch.arange(count, device=self.lam_re.device, dtype=self.lam_re.dtype) * stride
        size = (self.lam_re[:, :, None] * steps).exp_()
        angle = self.lam_im[:, :, None] * steps
        return size * angle.cos(), size * angle.sin()

    def chain(self, s0: Tensor, s1: Tensor, dskip: Tensor) -> SSMParams:
        """Gradients of the parameters, given d loss = 2 Re sum_n (S0 dw + w S1 dlam)."""
        bc = self.b * self.c
        along_lam = bc * self.dt * _hold_slope(torch.complex(self.lam_re, self.lam_im), self.z) * s0 + self.w * s1
        along_a = self.dt * along_lam
        along_dt = self.w * s0  # w is proportional to dt at fixed lam
        along_b = self.c * self.hold * s0
        along_c = self.b * self.hold * s0
        return SSMParams(
            log_dt=2 * (along_dt.real + along_lam.real * self.lam_re - along_lam.imag * self.lam_im).sum(dim=1),
            log_a_real=2 * along_a.real * self.a.real,
            a_imag=-2 * along_a.imag,
            b=torch.stack((2 * along_b.real, -2 * along_b.imag), dim=2),
            c=torch.stack((2 * along_c.real, -2 * along_c.imag), dim=2),
            skip=dskip.to(self.params.skip.dtype, copy=True),
        )


_SERIES_RADIUS = 0.25


def _hold_slope(lam: Tensor, z: Tensor) -> Tensor:
    """Derivative of (exp(lam) - 1)/lam, given z = exp(lam): ((lam - 1) z + 1)/lam^2.

    Its numerator cancels down to lam^2 / 2, so a small lam takes the series sum_k (k+1)/(k+2)! lam^k.
    """
    terms = 8 if lam.dtype == torch.complex64 else 15
    series = torch.zeros_like(lam)
    for k in reversed(range(terms)):
        series = series * lam + (k + 1) / math.factorial(k + 2)
    small = lam.abs() < _SERIES_RADIUS
    safe = torch.where(small, 1.0, lam)  # no 0/0 where the series is taken
    return torch.where(small, series, ((safe - 1) * z + 1) / safe.square())


@contextmanager
def _ieee_products(device: torch.device) -> Iterator[None]:
    """Matrix products in full fp32 whatever the user allows elsewhere: TF32 would cost three digits of the kernel."""
    flags: Any = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore
    before = flags.fp32_precision
    flags.fp32_precision = "ieee"
    try:
        yield
    finally:
        flags.fp32_precision = before


def _split(length: int) -> tuple[int, int]:
    """L0 and L1 with L0 L1 >= length, both near its square root."""
    fine = max(1, math.isqrt(length - 1) + 1)
    return fine, -(-length // fine)


def _fft_length(length: int) -> int:
    """Smallest 2^a 3^b 5^c, even, that holds all lags of a sequence: at least 2 length - 1."""
    least = 2 * length
    best = 1 << (least - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            n = three * max(2, 1 << max(0, (-(-least // three) - 1).bit_length()))
            best = min(best, n)
            three *= 3
        five *= 5
    return best


def _transform(x: Tensor, n: int, work: torch.dtype, channels: int) -> Tensor:
    """x (B, L, C) -> its real FFT over L padded to n, (B, C / D, D, F) with D = `channels`."""
    rows = x.transpose(1, 2).to(work).contiguous()  # (B, C, L)
    return torch.fft.rfft(rows, n=n).unflatten(1, (-1, channels))


def _kernel_transform(k_f: Tensor, k_b: Tensor, n: int) -> Tensor:
    """(2, D, F): the factor of each direction in the frequency domain."""
    fk = torch.fft.rfft(torch.stack((k_f, k_b)), n=n)
    fk[1].imag.neg_()  # the adjoint of a real convolution is its conjugate
    return fk


BACKEND = TorchBackend()
