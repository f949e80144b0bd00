# mypy: disable-error-code=no-untyped-def
"""The convolution kernel itself, (D, L), and its gradient: the two-level product, one channel and one tile at a time.

With l = first + 64 l1 + l0, K[l1, l0] = Re sum_n (c'_n z_n^(first + 64 l1)) z_n^l0: 16 + 64 powers a pole for 1024
lags.
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
def _columns(decay, turns, H: tl.constexpr):
    """z^l0 for l0 < 64, as (64, H), from poles (1, H)."""
    high, low = split_turns(turns)
    return power(decay.to(tl.float32), high, low, tl.arange(0, COLUMNS).to(tl.float32)[:, None])


@triton.jit
def _rows(decay, turns, first, H: tl.constexpr):
    """z^(first + 64 l1) for l1 < 16, as (16, H)."""
    high, low = split_turns(turns * COLUMNS)
    er, ei = power(decay.to(tl.float32) * COLUMNS, high, low, tl.arange(0, ROWS).to(tl.float32)[:, None])
    br, bi = far_power(decay, turns, first)
    return multiply(er, ei, br, bi)


@triton.jit
def generate_kernel(k_ptr, table_ptr, skips_ptr, L, D, direction, H: tl.constexpr):
    """k (D, L) float32, the skip included at lag 0. Grid (D, L / 1024)."""
    channel = tl.program_id(0)
    d = channel + tl.arange(0, 1)
    n = tl.arange(0, H)
    first = tl.program_id(1) * (ROWS * COLUMNS)
    decay, turns = load_pole(table_ptr, direction, d, n, D, H)
    cr, ci = load_weight(table_ptr, direction, d, n, D, H)
    qr, qi = _columns(decay, turns, H)
    pr, pi = _rows(decay, turns, first, H)
    pr, pi = multiply(pr, pi, cr, ci)
    k = tl.dot(pr, tl.trans(qr), input_precision="tf32x3") - tl.dot(pi, tl.trans(qi), input_precision="tf32x3")
    lag = first + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # (16, 64)
    k = tl.where(lag == 0, k + tl.load(skips_ptr + direction * D + channel), k)
    tl.store(k_ptr + channel.to(tl.int64) * L + lag, k, mask=lag < L)


@triton.jit
def generate_gradient_kernel(dk_ptr, table_ptr, sums_ptr, local_ptr, L, D, direction, H: tl.constexpr):
    """S0 and S1 of dk (D, L) as sums (2, 1, D, 4, H); local (2, 1, D, 1) takes the part of lag 0. Grid (D,).

    Lag 0 goes through `local`, because there dk is the gradient of the skip as well.
    """
    channel = tl.program_id(0)
    d = channel + tl.arange(0, 1)
    n = tl.arange(0, H)
    decay, turns = load_pole(table_ptr, direction, d, n, D, H)
    qr, qi = _columns(decay, turns, H)
    weight = tl.arange(0, COLUMNS).to(tl.float32)[:, None]
    wr, wi = qr * weight, qi * weight
    s0r = tl.zeros((H,), tl.float32)
    s0i = tl.zeros((H,), tl.float32)
    s1r = tl.zeros((H,), tl.float32)
    s1i = tl.zeros((H,), tl.float32)
    tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # (16, 64)
    for first in range(0, L, ROWS * COLUMNS):
        pr, pi = _rows(decay, turns, first, H)
        lag = first + tile
        dk = tl.load(dk_ptr + channel.to(tl.int64) * L + lag, mask=(lag < L) & (lag > 0), other=0.0)
        ar = tl.dot(dk, qr, input_precision="tf32x3")  # (16, H)
        ai = tl.dot(dk, qi, input_precision="tf32x3")
        far = (first + tl.arange(0, ROWS) * COLUMNS).to(tl.float32)[:, None]
        br = tl.dot(dk, wr, input_precision="tf32x3") + far * ar
        bi = tl.dot(dk, wi, input_precision="tf32x3") + far * ai
        s0r += tl.sum(ar * pr - ai * pi, axis=0)
        s0i += tl.sum(ar * pi + ai * pr, axis=0)
        s1r += tl.sum(br * pr - bi * pi, axis=0)
        s1i += tl.sum(br * pi + bi * pr, axis=0)
    out = sums_ptr + (direction * D + channel) * (4 * H) + n
    tl.store(out, s0r)
    tl.store(out + H, s0i)
    tl.store(out + 2 * H, s1r)
    tl.store(out + 3 * H, s1i)
    tl.store(local_ptr + direction * D + channel, tl.load(dk_ptr + channel.to(tl.int64) * L))
