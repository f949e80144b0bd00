"""The operator as its definition says, in float64: slow, and the yardstick of every other backend.

Kernels are summed state by state without any splitting; the convolution is a product with an explicit Toeplitz matrix.
Needs O(D N L) memory for the kernel and O(D L^2) for the convolution: meant for tests and parity checks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffussm.ops.params import SSMParams, is_shared, join_directions


class ReferenceBackend:
    """Definition in float64; runs wherever torch has complex128."""

    name = "reference"

    def available(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None where it can run, else why not."""
        return "float64 is missing on this device" if device.type == "mps" else None

    def kernel(self, params: SSMParams, length: int) -> Tensor:
        """(D, length) kernels with the skip at l = 0, in the parameters' dtype."""
        _, _, z, coeff, _ = _modes(params)
        k = 2 * (coeff[:, :, None] * _powers(z, length)).sum(dim=1).real  # (D, L)
        k[:, 0] += params.skip.double()
        return k.to(params.c.dtype)

    def kernel_backward(self, dk: Tensor, params: SSMParams) -> SSMParams:
        """Gradients of the parameters from dk (D, L)."""
        a, lam, z, w, (b, c) = _modes(params)
        dk = dk.double()
        powers = _powers(z, dk.shape[1])  # (D, N/2, L)
        s0 = (dk[:, None] * powers).sum(dim=2)  # (D, N/2): derivative of the loss along w, up to 2 Re
        ramp = torch.arange(dk.shape[1], device=dk.device, dtype=torch.float64)  # (L,)
        s1 = (dk[:, None] * ramp * powers).sum(dim=2)  # (D, N/2): along lam, divided by w
        hold = (z - 1) / a
        dt = params.log_dt.double().exp()[:, None]  # (D, 1)
        along_lam = b * c * z / a * s0 + w * s1
        along_a = dt * along_lam - w / a * s0
        grads = SSMParams(
            log_dt=2 * (along_lam * lam).real.sum(dim=1),
            log_a_real=2 * along_a.real * a.real,
            a_imag=-2 * along_a.imag,
            b=2 * torch.view_as_real((c * hold * s0).conj().resolve_conj()),
            c=2 * torch.view_as_real((b * hold * s0).conj().resolve_conj()),
            skip=dk[:, 0],
        )
        return SSMParams(*(g.to(p.dtype, copy=True).contiguous() for g, p in zip(grads, params, strict=True)))

    def conv(self, u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
        """y (B, L, 2D) from u (B, L, D) or (B, L, 2D) and the kernels (D, L)."""
        u_f, u_b = _inputs(u, k_f)
        y_f = torch.einsum("dts,bsd->btd", _toeplitz(k_f), u_f)
        y_b = torch.einsum("dst,bsd->btd", _toeplitz(k_b), u_b)
        return torch.cat((y_f, y_b), dim=2).to(u.dtype)

    def conv_backward(self, dy: Tensor, u: Tensor, k_f: Tensor, k_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """du like u, dk_f and dk_b (D, L), from dy (B, L, 2D)."""
        u_f, u_b = _inputs(u, k_f)
        dy_f, dy_b = dy.double().chunk(2, dim=2)
        du_f = torch.einsum("dts,btd->bsd", _toeplitz(k_f), dy_f)
        du_b = torch.einsum("dst,btd->bsd", _toeplitz(k_b), dy_b)
        dk_f = _lag_sums(torch.einsum("btd,bsd->dts", dy_f, u_f))
        dk_b = _lag_sums(torch.einsum("btd,bsd->dst", dy_b, u_b))
        du = join_directions(du_f, du_b, is_shared(u, k_f.shape[0]))
        return du.to(u.dtype), dk_f.to(k_f.dtype), dk_b.to(k_b.dtype)


def _modes(params: SSMParams) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """A, lam = dt A, z = exp(lam), w = C B (z - 1)/A and (B, C), all (D, N/2) complex128."""
    log_dt, log_a_real, a_imag, b_pair, c_pair, _ = (p.double() for p in params)
    a = torch.complex(-log_a_real.exp(), a_imag)
    b, c = torch.view_as_complex(b_pair.contiguous()), torch.view_as_complex(c_pair.contiguous())
    lam = log_dt.exp()[:, None] * a
    z = lam.exp()
    return a, lam, z, b * c * (z - 1) / a, (b, c)


def _powers(z: Tensor, length: int) -> Tensor:
    """(D, N/2, length): z^0, z^1, ..."""
    return z[:, :, None] ** torch.arange(length, device=z.device)


def _inputs(u: Tensor, k_f: Tensor) -> tuple[Tensor, Tensor]:
    """What the forward and the backward direction read, (B, L, D) each, float64."""
    u64 = u.double()
    if is_shared(u, k_f.shape[0]):
        return u64, u64
    u_f, u_b = u64.chunk(2, dim=2)
    return u_f, u_b


def _lags(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """lag[t, s] = max(t - s, 0), and the mask of t >= s; both (L, L)."""
    t = torch.arange(length, device=device)
    lag = t[:, None] - t
    return lag.clamp(min=0), lag >= 0


def _toeplitz(k: Tensor) -> Tensor:
    """(D, L, L) with k[d, t - s] at [d, t, s] for t >= s and 0 above."""
    lag, causal = _lags(k.shape[1], k.device)
    return k.double()[:, lag] * causal


def _lag_sums(m: Tensor) -> Tensor:
    """(D, L): sums of m (D, L, L) over t - s = l, the adjoint of `_toeplitz`."""
    lag, causal = _lags(m.shape[1], m.device)
    out = m.new_zeros(m.shape[0], m.shape[1])
    return out.index_add_(1, lag.flatten(), (m * causal).flatten(1))


BACKEND = ReferenceBackend()
