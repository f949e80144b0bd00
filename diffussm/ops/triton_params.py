# mypy: disable-error-code=no-untyped-def
"""Parameters to poles and back: zero-order hold and its gradient, one launch each for both directions.

The arithmetic is float64: (D, N/2) numbers cost nothing beside the sequence, and the phase of a pole is multiplied by
up to L later.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffussm.ops.triton_math import TABLE_FIELDS, cis_double, load_pole, multiply, power, split_turns


@triton.jit
def _hold(log_dt_ptr, log_a_real_ptr, a_imag_ptr, b_ptr, c_ptr, d, n, inside, N):
    """Everything that the table and its gradient need of one direction, each (DB, H) float64 (dt: (DB, 1)).

    A = -exp(log_a_real) + i a_imag, z = exp(dt A), phi = (z - 1) / A.
    """
    at = d[:, None] * N + n[None, :]
    dt = tl.exp(tl.load(log_dt_ptr + d[:, None], mask=inside, other=0.0).to(tl.float64))
    ar = -tl.exp(tl.load(log_a_real_ptr + at, mask=inside, other=0.0).to(tl.float64))
    ai = tl.load(a_imag_ptr + at, mask=inside, other=0.0).to(tl.float64)
    br = tl.load(b_ptr + 2 * at, mask=inside, other=0.0).to(tl.float64)
    bi = tl.load(b_ptr + 2 * at + 1, mask=inside, other=0.0).to(tl.float64)
    cr = tl.load(c_ptr + 2 * at, mask=inside, other=0.0).to(tl.float64)
    ci = tl.load(c_ptr + 2 * at + 1, mask=inside, other=0.0).to(tl.float64)
    turns = dt * ai * 0.15915494309189535  # / 2 pi
    cos, sin = cis_double(turns)
    size = tl.exp(dt * ar)
    zr, zi = size * cos, size * sin
    norm = ar * ar + ai * ai
    fr, fi = multiply(zr - 1.0, zi, ar / norm, -ai / norm)
    return dt, ar, ai, br, bi, cr, ci, turns, zr, zi, fr, fi


@triton.jit
def _write_table(
    log_dt, log_a_real, a_imag, b, c, skip, table_ptr, skips_ptr, direction, D, N, DB: tl.constexpr, H: tl.constexpr
):
    d = tl.program_id(0) * DB + tl.arange(0, DB)
    n = tl.arange(0, H)
    inside = (d < D)[:, None] & (n < N)[None, :]
    dt, ar, _ai, br, bi, cr, ci, turns, _zr, _zi, fr, fi = _hold(log_dt, log_a_real, a_imag, b, c, d, n, inside, N)
    wr, wi = multiply(br, bi, cr, ci)
    wr, wi = multiply(wr, wi, fr, fi)
    base = table_ptr + (direction * D + d[:, None]) * (TABLE_FIELDS * H) + n[None, :]
    stored = (d < D)[:, None] & (n < H)[None, :]
    # States beyond N are poles of weight zero, so that H may be a power of two.
    tl.store(base, tl.where(inside, dt * ar, 0.0), mask=stored)
    tl.store(base + H, tl.where(inside, turns - tl.floor(turns + 0.5), 0.0), mask=stored)
    tl.store(base + 2 * H, tl.where(inside, 2.0 * wr, 0.0), mask=stored)
    tl.store(base + 3 * H, tl.where(inside, 2.0 * wi, 0.0), mask=stored)
    value = tl.load(skip + d, mask=d < D, other=0.0)
    tl.store(skips_ptr + direction * D + d, value, mask=d < D)


@triton.jit
def table_kernel(
    f_log_dt, f_log_a_real, f_a_imag, f_b, f_c, f_skip,
    b_log_dt, b_log_a_real, b_a_imag, b_b, b_c, b_skip,
    table_ptr, skips_ptr, D, N, DB: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Fill the table (2, D, 4, H) float64 and the skips (2, D) float32. Grid (D / DB, directions)."""
    if tl.program_id(1) == 0:
        _write_table(f_log_dt, f_log_a_real, f_a_imag, f_b, f_c, f_skip, table_ptr, skips_ptr, 0, D, N, DB, H)
    else:
        _write_table(b_log_dt, b_log_a_real, b_a_imag, b_b, b_c, b_skip, table_ptr, skips_ptr, 1, D, N, DB, H)


@triton.jit
def _write_gradient(
    log_dt, log_a_real, a_imag, b, c, table_ptr, sums_ptr, local_ptr,
    g_log_dt, g_log_a_real, g_a_imag, g_b, g_c, g_skip,
    direction, D, N, parts, LOCAL: tl.constexpr, DB: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * DB + tl.arange(0, DB)
    n = tl.arange(0, H)
    known = d < D
    inside = known[:, None] & (n < N)[None, :]
    # S0 = sum_l dk[l] z^l and S1 = sum_l l dk[l] z^l: pairs in different chunks come summed, for each part.
    s0r = tl.zeros((DB, H), tl.float64)
    s0i = tl.zeros((DB, H), tl.float64)
    s1r = tl.zeros((DB, H), tl.float64)
    s1i = tl.zeros((DB, H), tl.float64)
    for part in range(parts):
        base = sums_ptr + (((direction * parts + part) * D + d[:, None]) * 4) * H + n[None, :]
        s0r += tl.load(base, mask=inside, other=0.0).to(tl.float64)
        s0i += tl.load(base + H, mask=inside, other=0.0).to(tl.float64)
        s1r += tl.load(base + 2 * H, mask=inside, other=0.0).to(tl.float64)
        s1i += tl.load(base + 3 * H, mask=inside, other=0.0).to(tl.float64)
    # Pairs in one chunk come as dk[l] for l < LOCAL.
    lags = tl.arange(0, LOCAL)
    dk = tl.zeros((DB, LOCAL), tl.float32)
    for part in range(parts):
        at = ((direction * parts + part) * D + d[:, None]) * LOCAL + lags[None, :]
        dk += tl.load(local_ptr + at, mask=known[:, None], other=0.0)
    decay, angle = load_pole(table_ptr, direction, d, n, D, H)
    high, low = split_turns(angle)
    step = lags.to(tl.float32)[None, :, None]
    er, ei = power(decay.to(tl.float32)[:, None, :], high[:, None, :], low[:, None, :], step)  # (DB, LOCAL, H)
    er, ei = er * dk[:, :, None], ei * dk[:, :, None]
    s0r += tl.sum(er, axis=1).to(tl.float64)
    s0i += tl.sum(ei, axis=1).to(tl.float64)
    s1r += tl.sum(er * step, axis=1).to(tl.float64)
    s1i += tl.sum(ei * step, axis=1).to(tl.float64)
    first = tl.sum(tl.where(lags[None, :] == 0, dk, 0.0), axis=1)
    tl.store(g_skip + d, first, mask=known)
    # Chain rule. g(w) = dL/dRe w + i dL/dIm w; through a holomorphic f, g(w) = conj(f'(w)) g(f).
    dt, ar, ai, br, bi, cr, ci, _turns, zr, zi, fr, fi = _hold(log_dt, log_a_real, a_imag, b, c, d, n, inside, N)
    gr, gi = s0r, -s0i  # g(c')
    bfr, bfi = multiply(br, bi, fr, fi)
    cfr, cfi = multiply(cr, ci, fr, fi)
    bcr, bci = multiply(br, bi, cr, ci)
    wr, wi = multiply(bcr, bci, fr, fi)
    gcr, gci = multiply(2.0 * bfr, -2.0 * bfi, gr, gi)
    gbr, gbi = multiply(2.0 * cfr, -2.0 * cfi, gr, gi)
    gfr, gfi = multiply(2.0 * bcr, -2.0 * bci, gr, gi)  # g(phi)
    tr, ti = multiply(2.0 * wr, 2.0 * wi, s1r, s1i)
    norm = ar * ar + ai * ai
    zar, zai = multiply(zr, zi, ar / norm, -ai / norm)  # d phi / d(dt A) at fixed A
    fzr, fzi = multiply(zar, -zai, gfr, gfi)
    gxr, gxi = tr + fzr, fzi - ti  # g(dt A)
    far, fai = multiply(fr, fi, ar / norm, -ai / norm)  # -d phi / dA at fixed dt A
    gar, gai = multiply(far, -fai, gfr, gfi)
    gar, gai = dt * gxr - gar, dt * gxi - gai  # g(A)
    g_dt = tl.sum(tl.where(inside, ar * gxr + ai * gxi, 0.0), axis=1)
    at = d[:, None] * N + n[None, :]
    scale = tl.exp(tl.load(log_dt + d, mask=known, other=0.0).to(tl.float64))
    tl.store(g_log_dt + d, (scale * g_dt).to(tl.float32), mask=known)
    tl.store(g_log_a_real + at, (gar * ar).to(tl.float32), mask=inside)
    tl.store(g_a_imag + at, gai.to(tl.float32), mask=inside)
    tl.store(g_b + 2 * at, gbr.to(tl.float32), mask=inside)
    tl.store(g_b + 2 * at + 1, gbi.to(tl.float32), mask=inside)
    tl.store(g_c + 2 * at, gcr.to(tl.float32), mask=inside)
    tl.store(g_c + 2 * at + 1, gci.to(tl.float32), mask=inside)


@triton.jit
def parameter_gradient_kernel(
    f_log_dt, f_log_a_real, f_a_imag, f_b, f_c,
    b_log_dt, b_log_a_real, b_a_imag, b_b, b_c,
    table_ptr, sums_ptr, local_ptr,
    gf_log_dt, gf_log_a_real, gf_a_imag, gf_b, gf_c, gf_skip,
    gb_log_dt, gb_log_a_real, gb_a_imag, gb_b, gb_c, gb_skip,
    D, N, parts, LOCAL: tl.constexpr, DB: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Gradients of all parameters from S0, S1 and the lags inside a chunk. Grid (D / DB, directions).

    sums: (2, parts, D, 4, H) float32, Re S0, Im S0, Re S1, Im S1; local: (2, parts, D, LOCAL) float32.
    """
    if tl.program_id(1) == 0:
        _write_gradient(
            f_log_dt, f_log_a_real, f_a_imag, f_b, f_c, table_ptr, sums_ptr, local_ptr,
            gf_log_dt, gf_log_a_real, gf_a_imag, gf_b, gf_c, gf_skip, 0, D, N, parts, LOCAL, DB, H,
        )  # fmt: skip
    else:
        _write_gradient(
            b_log_dt, b_log_a_real, b_a_imag, b_b, b_c, table_ptr, sums_ptr, local_ptr,
            gb_log_dt, gb_log_a_real, gb_a_imag, gb_b, gb_c, gb_skip, 1, D, N, parts, LOCAL, DB, H,
        )  # fmt: skip
