# mypy: disable-error-code=no-untyped-def
"""The convolution kernel itself, (D, L), and its gradient: the two-level product, one tile of 1024 lags at a time.

With l = 64 l1 + l0, K[l1, l0] = Re sum_n (c'_n z_n^(64 l1)) z_n^l0: 16 + 64 powers a pole for 1024 lags.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffussm.ops.triton_math import far_power, load_pole, load_weight, multiply, power, split_turns

ROWS = tl.constexpr(16)
COLUMNS = tl.constexpr(64)
TILE = 1024
"""Lags of one tile, ROWS * COLUMNS."""


@triton.jit
def _levels(decay, turns, first):
    """z^l0 as (DB, H, 64) and z^(first + 64 l1) as (DB, 16, H)."""
    rate = decay.to(tl.float32)
    high, low = split_turns(turns)
    l0 = tl.arange(0, COLUMNS).to(tl.float32)[None, None, :]
    qr, qi = power(rate[:, :, None], high[:, :, None], low[:, :, None], l0)
    high, low = split_turns(turns * COLUMNS)
    l1 = tl.arange(0, ROWS).to(tl.float32)[None, :, None]
    rate = rate * COLUMNS
    pr, pi = power(rate[:, None, :], high[:, None, :], low[:, None, :], l1)
    br, bi = far_power(decay, turns, first)
    pr, pi = multiply(pr, pi, br[:, None, :], bi[:, None, :])
    return qr, qi, pr, pi


@triton.jit
def generate_kernel(k_ptr, table_ptr, skips_ptr, L, D, direction, DB: tl.constexpr, H: tl.constexpr):
    """k (D, L) float32, the skip included at lag 0. Grid (D / DB, L / 1024)."""
    d = tl.program_id(0) * DB + tl.arange(0, DB)
    n = tl.arange(0, H)
    first = tl.program_id(1) * (ROWS * COLUMNS)
    decay, turns = load_pole(table_ptr, direction, d, n, D, H)
    cr, ci = load_weight(table_ptr, direction, d, n, D, H)
    qr, qi, pr, pi = _levels(decay, turns, first)
    pr, pi = multiply(pr, pi, cr[:, None, :], ci[:, None, :])
    k = tl.dot(pr, qr, input_precision="tf32x3") - tl.dot(pi, qi, input_precision="tf32x3")  # (DB, 16, 64)
    lag = first + (tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])[None, :, :]
    skip = tl.load(skips_ptr + direction * D + d, mask=d < D, other=0.0)
    k = tl.where(lag == 0, k + skip[:, None, None], k)
    tl.store(k_ptr + d[:, None, None].to(tl.int64) * L + lag, k, mask=(d < D)[:, None, None] & (lag < L))


@triton.jit
def generate_gradient_kernel(
    dk_ptr, table_ptr, sums_ptr, local_ptr, L, D, direction, DB: tl.constexpr, H: tl.constexpr
):
    """S0 and S1 of dk (D, L) as sums (2, 1, D, 4, H); local (2, 1, D, 1) takes the part of lag 0. Grid (D / DB,).

    Lag 0 goes through `local`, because there dk is the gradient of the skip as well.
    """
    d = tl.program_id(0) * DB + tl.arange(0, DB)
    n = tl.arange(0, H)
    decay, turns = load_pole(table_ptr, direction, d, n, D, H)
    s0r = tl.zeros((DB, H), tl.float32)
    s0i = tl.zeros((DB, H), tl.float32)
    s1r = tl.zeros((DB, H), tl.float32)
    s1i = tl.zeros((DB, H), tl.float32)
    columns = tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    tile = (rows[:, None] * COLUMNS + columns[None, :])[None, :, :]
    for first in range(0, L, ROWS * COLUMNS):
        qr, qi, pr, pi = _levels(decay, turns, first)
        lag = first + tile
        inside = (d < D)[:, None, None] & (lag < L) & (lag > 0)
        dk = tl.load(dk_ptr + d[:, None, None].to(tl.int64) * L + lag, mask=inside, other=0.0)  # (DB, 16, 64)
        weight = columns.to(tl.float32)[None, None, :]
        qr, qi = tl.trans(qr, 0, 2, 1), tl.trans(qi, 0, 2, 1)  # (DB, 64, H)
        ar = tl.dot(dk, qr, input_precision="tf32x3")  # (DB, 16, H)
        ai = tl.dot(dk, qi, input_precision="tf32x3")
        far = (first + rows * COLUMNS).to(tl.float32)[None, :, None]
        br = tl.dot(dk * weight, qr, input_precision="tf32x3") + far * ar
        bi = tl.dot(dk * weight, qi, input_precision="tf32x3") + far * ai
        s0r += tl.sum(ar * pr - ai * pi, axis=1)
        s0i += tl.sum(ar * pi + ai * pr, axis=1)
        s1r += tl.sum(br * pr - bi * pi, axis=1)
        s1i += tl.sum(br * pi + bi * pr, axis=1)
    out = sums_ptr + (direction * D + d[:, None]) * (4 * H) + n[None, :]
    inside = (d < D)[:, None] & (n < H)[None, :]
    tl.store(out, s0r, mask=inside)
    tl.store(out + H, s0i, mask=inside)
    tl.store(out + 2 * H, s1r, mask=inside)
    tl.store(out + 3 * H, s1i, mask=inside)
    dk = tl.load(dk_ptr + d.to(tl.int64) * L, mask=d < D, other=0.0)
    tl.store(local_ptr + direction * D + d, dk, mask=d < D)
