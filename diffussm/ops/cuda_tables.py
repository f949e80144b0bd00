"""Constants and kernel spectra of the Monarch convolution, laid out as the registers of `csrc/monarch.cu` want them.

A fragment is what one `mma.m16n8k16` takes or gives: lane 4 g + q holds rows g and g + 8 and columns 2 q and 2 q + 1
(and 8 more to the right in a left operand). Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIDE = 32
"""One warp transforms SIDE x SIDE points."""


def _lanes() -> tuple[Tensor, Tensor]:
    lane = torch.arange(32)
    return lane // 4, lane % 4


def _operand_index() -> tuple[Tensor, Tensor]:
    """Row and column in a left operand, (2, 2, 32, 4, 2): row tile, column tile, lane, register, half."""
    g, q = _lanes()
    tile = torch.arange(2)
    register = torch.arange(4)
    row = 16 * tile[:, None, None, None, None] + g[:, None, None] + 8 * (register % 2)[:, None]
    column = 16 * tile[:, None, None, None] + 8 * (register // 2)[:, None] + 2 * q[:, None, None] + torch.arange(2)
    shape = (2, 2, 32, 4, 2)
    return row.expand(shape), column.expand(shape)


def _result_index() -> tuple[Tensor, Tensor]:
    """Row and column of each element of a 32 x 32 result, (2, 4, 32, 4): row tile, column tile, lane, register."""
    g, q = _lanes()
    e = torch.arange(4)
    row = 16 * torch.arange(2)[:, None, None, None] + g[:, None] + 8 * (e // 2)
    column = 8 * torch.arange(4)[:, None, None] + 2 * q[:, None] + e % 2
    shape = (2, 4, 32, 4)
    return row.expand(shape), column.expand(shape)


def _cis(turns: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(turns), 2 * torch.pi * turns)


def constants(subs: int) -> Tensor:
    """All tables as one int32 tensor on the CPU, in the order of the offsets in `monarch.cu`.

    Args:
        subs: residues that warps share out, 1 (1024 points) or 4 (4096 points).
    """
    i = torch.arange(SIDE, dtype=torch.float64)
    product = i[:, None] * i
    dft = _cis(-product / SIDE)  # (k, n)
    into = dft * _cis(i / 128)  # the modulation exp(i pi n1 / 64) rides on the columns
    row, column = _operand_index()

    def operand(matrix: Tensor) -> Tensor:
        return matrix[row, column].half().contiguous().view(torch.int32).flatten()

    out = into.T
    row_c, column_c = _result_index()
    twiddle = _cis(-product / SIDE**2 + i / (4 * SIDE**2))  # (k1, n2): exp(-2 pi i k1 n2 / 1024) exp(i pi n2 / 2048)

    def result(matrix: Tensor) -> Tensor:
        return torch.view_as_real(matrix[row_c, column_c]).float().contiguous().view(torch.int32).flatten()

    parts = [operand(m) for m in (into.real, into.imag, dft.real, dft.imag, out.real, out.imag)]
    parts += [result(twiddle), result(twiddle.conj().resolve_conj().T)]
    if subs == 4:
        k = i[:, None] + SIDE * i  # (k1, k2)
        parts.append(result(_cis(-(4 * k - 1) / (4 * 4 * SIDE**2))))
    return torch.cat(parts)


def spectra(k_f: Tensor, k_b: Tensor, subs: int) -> tuple[Tensor, Tensor]:
    """Modulated transforms of both directions' kernels, and what undoes their scaling.

    Args:
        k_f: (D, L) float32, L <= 1024 subs.
        k_b: (D, L); its transform is conjugated, because that direction is the adjoint of a causal convolution.
        subs: as in `constants`.

    Returns:
        int32 (2, D, 8 * 32 * subs * 4), pairs of float16 (Re, Im) in register order, and float32 (2, D).
    """
    points = SIDE**2 * subs
    k = torch.stack((k_f, k_b)).double()
    n = torch.arange(points, dtype=torch.float64, device=k.device)
    k = torch.nn.functional.pad(k, (0, points - k.shape[2]))
    spectrum = torch.fft.fft(k * _cis(n / (4 * points)))  # (2, D, points)
    spectrum = torch.stack((spectrum[0], spectrum[1].conj()))
    row, column = (x.to(k.device) for x in _result_index())
    j = torch.arange(subs, device=k.device)
    index = (row + SIDE * column)[:, :, :, None, :] + SIDE**2 * j[:, None]  # (2, 4, 32, subs, 4)
    # One power of two a channel keeps float16 in range without a rounding.
    scale = torch.exp2(torch.floor(torch.log2(spectrum.abs().amax(dim=2).clamp(min=1e-30))))  # (2, D)
    pairs = torch.view_as_real((spectrum / scale[:, :, None])[:, :, index.flatten()]).half()
    return pairs.contiguous().view(torch.int32).flatten(2), (scale / points).float()
