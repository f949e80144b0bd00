# mypy: disable-error-code=no-untyped-def
"""Gradient of the state-space parameters from u and dy, chunk by chunk, without ever forming dk.

All parameters see the sequences through two sums a pole, S0 = sum_l dk[l] z^l and S1 = sum_l l dk[l] z^l with
dk[l] = sum_{b,t} dy[t] u[t-l]. Let e be the distance of a position from the chunk's end on the side of u and from its
start on the side of dy. For positions in different chunks the lag is e_u + e_dy + 1 + C (chunks between), so with

    H = sum z^e u    H' = sum (e + 1/2) z^e u    (carried over earlier chunks)
    G = sum z^e dy   G' = sum (e + 1/2) z^e dy   (one chunk)

S0 = z sum G H and S1 = z sum (G H' + G' H). Lags inside a chunk come out as dk[l], l < C, from one C x C product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffussm.ops.triton_math import load_pole, multiply, operand, power, product, rest, split_turns
from diffussm.ops.triton_scan import join_segments


@triton.jit
def gradient_kernel(
    u_ptr, g_ptr, starts_ptr, table_ptr, sums_ptr, local_ptr, B, L, D,
    u_direction, u_b, u_l, u_d, g_direction, g_b, g_l, g_d, length, segments,
    LOCAL: tl.constexpr, DB: tl.constexpr, BB: tl.constexpr, C: tl.constexpr, H: tl.constexpr, HS: tl.constexpr,
    KIND: tl.constexpr, ROUND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of one (batch block, segment): sums (2, parts, D, 4, H), local (2, parts, D, LOCAL), float32.

    Grid (D / DB, B / BB * segments, 2 H / HS): a program takes HS of the states, so that its registers suffice. The
    matrices are split in two operands, because these sums cancel (tenfold in the gradient of log_dt). `starts` holds
    four fields, see `segment_kernel`.
    """
    direction = tl.program_id(2) % 2
    share = tl.program_id(2) // 2
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    segment = part % segments
    b = (part // segments) * BB + tl.arange(0, BB)
    d = tl.program_id(0) * DB + tl.arange(0, DB)
    n = share * HS + tl.arange(0, HS)
    e = tl.arange(0, C)
    decay, turns = load_pole(table_ptr, direction, d, n, D, H)
    high, low = split_turns(turns)
    rate = decay.to(tl.float32)
    weight = e.to(tl.float32)[None, :, None]
    er, ei = power(rate[:, None, :], high[:, None, :], low[:, None, :], weight)  # (DB, C, H)
    qr, qi = operand(er, KIND, ROUND), operand(ei, KIND, ROUND)
    vr, vi = rest(er, KIND, ROUND), rest(ei, KIND, ROUND)
    er, ei = er * (weight + 0.5), ei * (weight + 0.5)
    pr, pi = operand(er, KIND, ROUND), operand(ei, KIND, ROUND)
    xr, xi = rest(er, KIND, ROUND), rest(ei, KIND, ROUND)
    wr, wi = power(rate, high, low, C * 1.0)
    wr, wi = wr[:, None, :], wi[:, None, :]
    hr, hi, dr, di = join_segments(
        starts_ptr, decay, turns, direction, segment, segments, length, direction, b, d, n, B, D, 4, DB, BB, H, HS
    )
    channels = (d < D)[:, None, None] & (b < B)[None, :, None]
    at_u = u_ptr + direction * u_direction + b[None, :, None].to(tl.int64) * u_b + d[:, None, None] * u_d
    at_g = g_ptr + direction * g_direction + b[None, :, None].to(tl.int64) * g_b + d[:, None, None] * g_d
    s0r = tl.zeros((DB, HS), tl.float32)
    s0i = tl.zeros((DB, HS), tl.float32)
    s1r = tl.zeros((DB, HS), tl.float32)
    s1i = tl.zeros((DB, HS), tl.float32)
    pairs = tl.zeros((DB, C, C), tl.float32)  # (DB, e_u, e_dy)
    chunks = length // C
    for i in range(chunks):
        chunk = tl.where(direction != 0, chunks - 1 - i, i)
        first = segment * length + chunk * C
        near = first + e
        far = first + C - 1 - e
        pos_u = tl.where(direction != 0, near, far)
        pos_g = tl.where(direction != 0, far, near)
        u = tl.load(at_u + pos_u[None, None, :] * u_l, mask=channels & (pos_u < L)[None, None, :], other=0.0)
        g = tl.load(at_g + pos_g[None, None, :] * g_l, mask=channels & (pos_g < L)[None, None, :], other=0.0)
        u, g = operand(u, KIND, ROUND), operand(g, KIND, ROUND)  # (DB, BB, C)
        pairs += tl.dot(tl.trans(u, 0, 2, 1), g, input_precision=PRECISION)
        gr = product(g, qr, vr, SPLIT, PRECISION)  # (DB, BB, H)
        gi = product(g, qi, vi, SPLIT, PRECISION)
        s0r += tl.sum(gr * hr - gi * hi, axis=1)
        s0i += tl.sum(gr * hi + gi * hr, axis=1)
        s1r += tl.sum(gr * dr - gi * di, axis=1)
        s1i += tl.sum(gr * di + gi * dr, axis=1)
        gr = product(g, pr, xr, SPLIT, PRECISION)
        gi = product(g, pi, xi, SPLIT, PRECISION)
        s1r += tl.sum(gr * hr - gi * hi, axis=1)
        s1i += tl.sum(gr * hi + gi * hr, axis=1)
        dr, di = multiply(wr, wi, dr + hr * C, di + hi * C)
        dr += product(u, pr, xr, SPLIT, PRECISION)
        di += product(u, pi, xi, SPLIT, PRECISION)
        hr, hi = multiply(wr, wi, hr, hi)
        hr += product(u, qr, vr, SPLIT, PRECISION)
        hi += product(u, qi, vi, SPLIT, PRECISION)
    zr, zi = power(rate, high, low, 1.0)
    s0r, s0i = multiply(zr, zi, s0r, s0i)
    s1r, s1i = multiply(zr, zi, s1r, s1i)
    row = (direction * parts + part) * D + d
    out = sums_ptr + row[:, None].to(tl.int64) * (4 * H) + n[None, :]
    inside = (d < D)[:, None] & (n < H)[None, :]
    tl.store(out, s0r, mask=inside)
    tl.store(out + H, s0i, mask=inside)
    tl.store(out + 2 * H, s1r, mask=inside)
    tl.store(out + 3 * H, s1i, mask=inside)
    # Every share has the same pairs; the first stores them.
    lag = (e[:, None] + e[None, :] - (C - 1))[None, :, :]
    for step in range(C):
        dk = tl.sum(tl.sum(tl.where(lag == step, pairs, 0.0), axis=2), axis=1)
        tl.store(local_ptr + row.to(tl.int64) * LOCAL + step, dk, mask=(d < D) & (share == 0))
