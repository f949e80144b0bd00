# mypy: disable-error-code=no-untyped-def
"""Chunked scan: parameters and sequence to output in one kernel, with no transform and nothing of size L kept.

A chunk of C positions is a C x C Toeplitz product; what lies outside the chunk reaches it through the H complex states
of each channel. With H_j = sum over s before chunk j of z^(start_j - 1 - s) u[s],

    y[start_j + t] = sum_{s <= t} k[t - s] u[start_j + s] + Re sum_n c'_n z_n^(t+1) H_jn
    H_{j+1}        = z^C H_j + sum_s z^(C-1-s) u[start_j + s]

so every step is three small matrix products with constant matrices that live in registers, for DB channels and 16
sequences at once. The reverse direction walks the chunks from the end with mirrored exponents; no flip of u is made.
Long sequences are cut into segments that run in parallel: `segment_kernel` gives each segment's own end state, and the
scan joins those of the earlier segments before it starts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffussm.ops.triton_math import (
    far_power,
    load_pole,
    load_weight,
    multiply,
    operand,
    power,
    product,
    rest,
    split_turns,
)


@triton.jit
def input_matrix(rate, high, low, reverse, C: tl.constexpr):
    """z^e that takes u[s] to the state at the end of its chunk, (DB, C, H): e = C-1-s, in reverse s."""
    s = tl.arange(0, C)
    exponent = tl.where(reverse != 0, s, C - 1 - s).to(tl.float32)[None, :, None]
    return power(rate[:, None, :], high[:, None, :], low[:, None, :], exponent)


@triton.jit
def join_segments(
    starts_ptr, decay, turns, direction, segment, segments, length, reverse, b, d, n, B, D,
    FIELDS: tl.constexpr, DB: tl.constexpr, BB: tl.constexpr, H: tl.constexpr, HS: tl.constexpr,
):  # fmt: skip
    """State before `segment` from the end states of all segments that the direction visits earlier, 4 x (DB, BB, HS).

    The last two results are the derivative states sum (e + 1/2) z^e u (zero where FIELDS is 2).
    """
    hr = tl.zeros((DB, BB, HS), tl.float32)
    hi = tl.zeros((DB, BB, HS), tl.float32)
    dr = tl.zeros((DB, BB, HS), tl.float32)
    di = tl.zeros((DB, BB, HS), tl.float32)
    wr, wi = far_power(decay, turns, length)
    wr, wi = wr[:, None, :], wi[:, None, :]
    inside = (d < D)[:, None, None] & (b < B)[None, :, None] & (n < H)[None, None, :]
    earlier = tl.where(reverse != 0, segments - 1 - segment, segment)
    for i in range(earlier):
        other = tl.where(reverse != 0, segments - 1 - i, i)
        row = ((direction * segments + other) * B + b[None, :, None]).to(tl.int64) * D + d[:, None, None]
        at = starts_ptr + row * (FIELDS * H) + n[None, None, :]
        if FIELDS == 4:
            dr, di = multiply(wr, wi, dr + hr * length, di + hi * length)
            dr += tl.load(at + 2 * H, mask=inside, other=0.0)
            di += tl.load(at + 3 * H, mask=inside, other=0.0)
        hr, hi = multiply(wr, wi, hr, hi)
        hr += tl.load(at, mask=inside, other=0.0)
        hi += tl.load(at + H, mask=inside, other=0.0)
    return hr, hi, dr, di


@triton.jit
def segment_kernel(
    u_ptr, starts_ptr, table_ptr, B, L, D, u_direction, u_b, u_l, u_d, length, segments, direction_base, flip,
    FIELDS: tl.constexpr, DB: tl.constexpr, BB: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    KIND: tl.constexpr, ROUND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """End state of each segment started from zero: (2, segments, B, D, FIELDS, H) float32.

    Grid (D / DB, B / BB * segments, directions). `length` is a multiple of C.
    """
    direction = direction_base + tl.program_id(2)
    reverse = direction ^ flip
    segment = tl.program_id(1) % segments
    b = (tl.program_id(1) // segments) * BB + tl.arange(0, BB)
    d = tl.program_id(0) * DB + tl.arange(0, DB)
    n = tl.arange(0, H)
    decay, turns = load_pole(table_ptr, direction, d, n, D, H)
    high, low = split_turns(turns)
    rate = decay.to(tl.float32)
    er, ei = input_matrix(rate, high, low, reverse, C)
    qr, qi = operand(er, KIND, ROUND), operand(ei, KIND, ROUND)
    vr, vi = rest(er, KIND, ROUND), rest(ei, KIND, ROUND)
    wr, wi = power(rate, high, low, C * 1.0)
    wr, wi = wr[:, None, :], wi[:, None, :]
    t = tl.arange(0, C)
    if FIELDS == 4:
        weight = tl.where(reverse != 0, t, C - 1 - t).to(tl.float32)[None, :, None] + 0.5
        er, ei = er * weight, ei * weight
        pr, pi = operand(er, KIND, ROUND), operand(ei, KIND, ROUND)
        xr, xi = rest(er, KIND, ROUND), rest(ei, KIND, ROUND)
    channels = (d < D)[:, None, None] & (b < B)[None, :, None]
    at = u_ptr + direction * u_direction + b[None, :, None].to(tl.int64) * u_b + d[:, None, None] * u_d
    hr = tl.zeros((DB, BB, H), tl.float32)
    hi = tl.zeros((DB, BB, H), tl.float32)
    dr = tl.zeros((DB, BB, H), tl.float32)
    di = tl.zeros((DB, BB, H), tl.float32)
    chunks = length // C
    for i in range(chunks):
        chunk = tl.where(reverse != 0, chunks - 1 - i, i)
        pos = segment * length + chunk * C + t
        u = tl.load(at + pos[None, None, :] * u_l, mask=channels & (pos < L)[None, None, :], other=0.0)
        u = operand(u, KIND, ROUND)  # (DB, BB, C)
        if FIELDS == 4:
            dr, di = multiply(wr, wi, dr + hr * C, di + hi * C)
            dr += product(u, pr, xr, SPLIT, PRECISION)
            di += product(u, pi, xi, SPLIT, PRECISION)
        hr, hi = multiply(wr, wi, hr, hi)
        hr += product(u, qr, vr, SPLIT, PRECISION)
        hi += product(u, qi, vi, SPLIT, PRECISION)
    row = ((direction * segments + segment) * B + b[None, :, None]).to(tl.int64) * D + d[:, None, None]
    out = starts_ptr + row * (FIELDS * H) + n[None, None, :]
    inside = channels & (n < H)[None, None, :]
    tl.store(out, hr, mask=inside)
    tl.store(out + H, hi, mask=inside)
    if FIELDS == 4:
        tl.store(out + 2 * H, dr, mask=inside)
        tl.store(out + 3 * H, di, mask=inside)


@triton.jit
def scan_kernel(
    u_ptr, y_ptr, starts_ptr, table_ptr, skips_ptr, B, L, D,
    u_direction, u_b, u_l, u_d, y_direction, y_b, y_l, y_d, length, segments, direction_base, flip,
    ADD: tl.constexpr, DB: tl.constexpr, BB: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    KIND: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = k * u for each direction, or y += k * u with ADD; any strides, any L. Grid as `segment_kernel`.

    `flip` 1 swaps causal and anticausal: the adjoint, which the gradient of u needs.
    """
    direction = direction_base + tl.program_id(2)
    reverse = direction ^ flip
    segment = tl.program_id(1) % segments
    b = (tl.program_id(1) // segments) * BB + tl.arange(0, BB)
    d = tl.program_id(0) * DB + tl.arange(0, DB)
    n = tl.arange(0, H)
    t = tl.arange(0, C)
    decay, turns = load_pole(table_ptr, direction, d, n, D, H)
    cr, ci = load_weight(table_ptr, direction, d, n, D, H)
    skip = tl.load(skips_ptr + direction * D + d, mask=d < D, other=0.0)
    high, low = split_turns(turns)
    rate = decay.to(tl.float32)
    # k is split evenly between the way into the state and the way out of it: float16 would lose c' ~ dt or overflow H.
    size = tl.sqrt(tl.sum(tl.abs(cr) + tl.abs(ci), axis=1) / H + 1e-24)[:, None]
    er, ei = input_matrix(rate, high, low, reverse, C)  # (DB, C, H)
    k = tl.sum(cr[:, None, :] * er - ci[:, None, :] * ei, axis=2)  # (DB, C), lag by the exponents of the input matrix
    qr, qi = operand(er * size[:, None, :], KIND, ROUND), operand(ei * size[:, None, :], KIND, ROUND)
    exponent = tl.where(reverse != 0, C - t, t + 1).to(tl.float32)[None, None, :]
    er, ei = power(rate[:, :, None], high[:, :, None], low[:, :, None], exponent)  # (DB, H, C)
    er, ei = multiply((cr / size)[:, :, None], (ci / size)[:, :, None], er, ei)
    pr, pi = operand(er, KIND, ROUND), operand(-ei, KIND, ROUND)
    lag = tl.where(reverse != 0, t[:, None] - t[None, :], t[None, :] - t[:, None])[None, :, :]
    toeplitz = tl.zeros((DB, C, C), tl.float32)  # (DB, s, t)
    own = tl.where(reverse != 0, t, C - 1 - t)[None, :]
    k = tl.where(own == 0, k + skip[:, None], k)
    for step in range(C):
        one = tl.sum(tl.where(own == step, k, 0.0), axis=1)  # registers cannot be indexed, only selected
        toeplitz = tl.where(lag == step, one[:, None, None], toeplitz)
    toeplitz = operand(toeplitz, KIND, ROUND)
    wr, wi = power(rate, high, low, C * 1.0)
    wr, wi = wr[:, None, :], wi[:, None, :]
    hr, hi, _dr, _di = join_segments(
        starts_ptr, decay, turns, direction, segment, segments, length, reverse, b, d, n, B, D, 2, DB, BB, H, H
    )
    hr, hi = hr * size[:, None, :], hi * size[:, None, :]
    channels = (d < D)[:, None, None] & (b < B)[None, :, None]
    at_u = u_ptr + direction * u_direction + b[None, :, None].to(tl.int64) * u_b + d[:, None, None] * u_d
    at_y = y_ptr + direction * y_direction + b[None, :, None].to(tl.int64) * y_b + d[:, None, None] * y_d
    chunks = length // C
    for i in range(chunks):
        chunk = tl.where(reverse != 0, chunks - 1 - i, i)
        pos = segment * length + chunk * C + t
        inside = channels & (pos < L)[None, None, :]
        u = tl.load(at_u + pos[None, None, :] * u_l, mask=inside, other=0.0)
        u = operand(u, KIND, ROUND)  # (DB, BB, C)
        y = tl.dot(u, toeplitz, input_precision=PRECISION)
        y += tl.dot(operand(hr, KIND, ROUND), pr, input_precision=PRECISION)
        y += tl.dot(operand(hi, KIND, ROUND), pi, input_precision=PRECISION)
        hr, hi = multiply(wr, wi, hr, hi)
        hr += tl.dot(u, qr, input_precision=PRECISION)
        hi += tl.dot(u, qi, input_precision=PRECISION)
        out = at_y + pos[None, None, :] * y_l
        if ADD:
            y += tl.load(out, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, operand(y, KIND, ROUND), mask=inside)
