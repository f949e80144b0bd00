# mypy: disable-error-code=no-untyped-def
"""Device functions that the Triton kernels share: powers of the poles, complex products, operand rounding.

An angle is kept in turns (radians / 2 pi), so that reduction is a subtraction of an integer and loses nothing.
`tl.sin` and `tl.cos` would carry a slow path through local memory; the polynomials below run anywhere, the
interpreter included.
"""

from __future__ import annotations

import triton
import triton.language as tl

TABLE_FIELDS = tl.constexpr(4)
"""Fields of a pole in the float64 table (2, D, 4, H): log decay, turns, Re c', Im c'; k[l] = Re sum_n c'_n z_n^l."""


@triton.jit
def cis(turns):
    """cos and sin of an angle in turns, float32, absolute error below 2e-7.

    Minimax polynomials on an eighth of a turn, fitted in float64 (errors 1.2e-9 and 4.7e-11 before rounding).
    """
    r = turns - tl.floor(turns + 0.5)
    quarter = tl.floor(4.0 * r + 0.5)  # -2 .. 2
    x = r - 0.25 * quarter
    x2 = x * x
    s = x * (6.283185220342053 + x2 * (-41.34162804280206 + x2 * (81.58812465197263 + x2 * -75.24006458242764)))
    c = 1.0 + x2 * (-19.739208650388647 + x2 * (64.93931621552251 + x2 * (-85.44285272395913 + x2 * 59.22042440148348)))
    odd = (quarter == 1.0) | (quarter == -1.0)
    half = (quarter == 2.0) | (quarter == -2.0)
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    cos = tl.where(half | (quarter == 1.0), -cos, cos)
    sin = tl.where(half | (quarter == -1.0), -sin, sin)
    return cos, sin


@triton.jit
def cis_double(turns):
    """cos and sin of an angle in turns, float64, by Taylor series on an eighth of a turn (error below 1e-15)."""
    r = turns - tl.floor(turns + 0.5)
    quarter = tl.floor(4.0 * r + 0.5)
    x = (r - 0.25 * quarter) * 6.283185307179586
    x2 = x * x
    s = 1.0 - x2 / 156.0 * (1.0 - x2 / 210.0)
    s = 1.0 - x2 / 42.0 * (1.0 - x2 / 72.0 * (1.0 - x2 / 110.0 * s))
    s = x * (1.0 - x2 / 6.0 * (1.0 - x2 / 20.0 * s))
    c = 1.0 - x2 / 132.0 * (1.0 - x2 / 182.0 * (1.0 - x2 / 240.0))
    c = 1.0 - x2 / 30.0 * (1.0 - x2 / 56.0 * (1.0 - x2 / 90.0 * c))
    c = 1.0 - x2 / 2.0 * (1.0 - x2 / 12.0 * c)
    odd = (quarter == 1.0) | (quarter == -1.0)
    half = (quarter == 2.0) | (quarter == -2.0)
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    cos = tl.where(half | (quarter == 1.0), -cos, cos)
    sin = tl.where(half | (quarter == -1.0), -sin, sin)
    return cos, sin


@triton.jit
def load_pole(table_ptr, direction, d, n, D, H: tl.constexpr):
    """Log decay and turns of each pole for one direction, (DB, H) float64; channels beyond D read as zero."""
    base = table_ptr + ((direction * D + d[:, None]).to(tl.int64) * TABLE_FIELDS) * H + n[None, :]
    inside = (d < D)[:, None]
    return tl.load(base, mask=inside, other=0.0), tl.load(base + H, mask=inside, other=0.0)


@triton.jit
def load_weight(table_ptr, direction, d, n, D, H: tl.constexpr):
    """Re c' and Im c' of each pole for one direction, (DB, H) float32; channels beyond D read as zero."""
    base = table_ptr + ((direction * D + d[:, None]).to(tl.int64) * TABLE_FIELDS) * H + n[None, :]
    inside = (d < D)[:, None]
    re = tl.load(base + 2 * H, mask=inside, other=0.0)
    im = tl.load(base + 3 * H, mask=inside, other=0.0)
    return re.to(tl.float32), im.to(tl.float32)


@triton.jit
def split_turns(turns):
    """Float64 turns as a float32 of 17 fractional bits, whose product with an integer <= 64 is exact, and the rest."""
    turns = turns - tl.floor(turns + 0.5)
    high = tl.floor(turns * 131072.0 + 0.5) / 131072.0
    return high.to(tl.float32), (turns - high).to(tl.float32)


@triton.jit
def power(decay, high, low, t):
    """z^t for float32 integers 0 <= t <= 64, with z = exp(decay + 2 pi i (high + low)), as (Re, Im)."""
    coarse = high * t
    coarse = coarse - tl.floor(coarse + 0.5)
    cos, sin = cis(coarse + low * t)
    size = tl.exp(decay * t)
    return size * cos, size * sin


@triton.jit
def far_power(decay, turns, t):
    """z^t for any integer t, reduced in float64, as float32 (Re, Im)."""
    angle = turns * t
    angle = angle - tl.floor(angle + 0.5)
    cos, sin = cis(angle.to(tl.float32))
    size = tl.exp((decay * t).to(tl.float32))
    return size * cos, size * sin


@triton.jit
def multiply(ar, ai, br, bi):
    """Complex product."""
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def operand(x, KIND: tl.constexpr, ROUND: tl.constexpr):
    """`x` as a matrix operand, or as an output.

    ROUND is set in the interpreter for bfloat16, whose casts truncate and whose matrix product is wrong there: the
    value is rounded to the nearest bfloat16 and stays float32, which is what the tensor cores multiply.
    """
    if ROUND:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(KIND)


@triton.jit
def rest(x, KIND: tl.constexpr, ROUND: tl.constexpr):
    """What `operand` cut off, as an operand of its own: two products then give 16 (bfloat16) or 22 bits (float16)."""
    return operand(x - operand(x, KIND, ROUND).to(tl.float32), KIND, ROUND)


@triton.jit
def product(a, high, low, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """a (high + low), or a high unless SPLIT."""
    y = tl.dot(a, high, input_precision=PRECISION)
    if SPLIT:
        y = tl.dot(a, low, acc=y, input_precision=PRECISION)
    return y
