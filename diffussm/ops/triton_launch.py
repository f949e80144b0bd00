"""From tensors to grids: allocates, picks the cut of long sequences and launches the Triton kernels."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffussm.ops.params import SSMParams, is_shared
from diffussm.ops.triton_generate import TILE, generate_gradient_kernel, generate_kernel
from diffussm.ops.triton_grad import gradient_kernel
from diffussm.ops.triton_params import parameter_gradient_kernel, table_kernel
from diffussm.ops.triton_scan import scan_kernel, segment_kernel

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether TRITON_INTERPRET=1 was set when Triton was imported: kernels then run on the CPU, slowly, for tests."""

BLOCK_B = 16
"""Sequences of one program: the least that a matrix product of the tensor cores takes."""

CHUNK_MAX = 32
"""Longest chunk that autotuning may choose; segments are multiples of it."""

_SEGMENT_MIN = 256
_SHARE = 16  # states of one program of the gradient
_KIND = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _config(channels: int, chunk: int, stages: int) -> triton.Config:
    """As many warps as channels: a batched product gives each warp whole matrices, and more warps would repeat them."""
    return triton.Config({"DB": channels, "C": chunk}, num_warps=channels, num_stages=stages)


# Channels of a program and chunk to choose from, without and with float32 operands. The first is taken
# unmeasured in the interpreter or with DIFFUSSM_TRITON_AUTOTUNE=0. All stay within 99 KB of shared memory; a test holds
# registers and spills against a budget.
CONFIGS: dict[str, dict[bool, list[triton.Config]]] = {
    "scan": {
        False: [_config(8, 16, 2), _config(4, 16, 2), _config(4, 32, 2)],
        True: [_config(4, 16, 2), _config(2, 16, 2)],
    },
    "gradient": {
        False: [_config(8, 16, 1), _config(2, 16, 1)],
        True: [_config(4, 16, 1), _config(2, 16, 1)],
    },
}

# Another choice changes the last bits: a run that must repeat bit for bit on another day switches measuring off.
_FIXED = INTERPRETED or os.environ.get("DIFFUSSM_TRITON_AUTOTUNE", "1") == "0"


def _tuned(kernel: Any, family: str, key: list[str], **options: Any) -> dict[bool, Any]:
    """Autotuned forms of a kernel by whether its operands are float32."""
    return {
        wide: triton.autotune(configs[:1] if _FIXED else configs, key=key, **options)(kernel)
        for wide, configs in CONFIGS[family].items()
    }


# Measuring runs the kernel many times over: what it adds to must be put back.
_scan = _tuned(scan_kernel, "scan", ["D", "L", "ADD"], restore_value=["y_ptr"])
_segment = _tuned(segment_kernel, "scan", ["D", "L"])
_segment_derivative = _tuned(segment_kernel, "gradient", ["D", "L"])
_gradient = _tuned(gradient_kernel, "gradient", ["D", "L"])


def forward(u: Tensor, forward: SSMParams, backward: SSMParams, segments: int | None = None) -> Tensor:
    """y (B, L, 2D), contiguous, from u (B, L, D) or (B, L, 2D) of any strides.

    Args:
        segments: how many pieces of each sequence run in parallel; None chooses by the size of the card.
    """
    table, skips = _table(forward, backward)
    channels = forward.channels
    y = u.new_empty(u.shape[0], u.shape[1], 2 * channels, dtype=_stored(u.dtype))
    step = 0 if is_shared(u, channels) else channels * u.stride(2)
    cut = _Cut(u, channels, segments)
    starts = cut.starts(u, step, table, fields=2, flip=0)
    cut.scan(u, step, y, channels, starts, table, skips, flip=0)
    return y.to(u.dtype)


def backward(
    dy: Tensor, u: Tensor, forward: SSMParams, backward: SSMParams, segments: int | None = None
) -> tuple[Tensor, SSMParams, SSMParams]:
    """du like u (contiguous) and the gradients of both directions' parameters, from dy (B, L, 2D) of any strides."""
    channels = forward.channels
    table, skips = _table(forward, backward)
    cut = _Cut(u, channels, segments)
    out_step = channels * dy.stride(2)
    # The adjoint of a direction is the same scan the other way round.
    du = u.new_empty(u.shape, dtype=_stored(u.dtype))
    starts = cut.starts(dy, out_step, table, fields=2, flip=1)
    if is_shared(u, channels):
        cut.scan(dy, out_step, du, 0, starts, table, skips, flip=1, directions=(0,))
        cut.scan(dy, out_step, du, 0, starts, table, skips, flip=1, directions=(1,), add=True)
    else:
        cut.scan(dy, out_step, du, channels, starts, table, skips, flip=1)
    in_step = 0 if is_shared(u, channels) else channels * u.stride(2)
    starts = cut.starts(u, in_step, table, fields=4, flip=0)
    sums, local = cut.gradient(u, in_step, dy, out_step, starts, table)
    d_forward, d_backward = _parameter_gradient(forward, backward, table, sums, local)
    return du.to(u.dtype), d_forward, d_backward


def generate(params: SSMParams, length: int) -> Tensor:
    """Kernels (D, length) float32, the skip included at lag 0."""
    table, skips = _table(params, params)
    k = table.new_empty(params.channels, length, dtype=torch.float32)
    grid = (params.channels, triton.cdiv(length, TILE))
    with torch.cuda.device_of(k):
        generate_kernel[grid](k, table, skips, length, params.channels, 0, H=table.shape[3], num_warps=4)
    return k.to(params.c.dtype)


def generate_gradient(dk: Tensor, params: SSMParams) -> SSMParams:
    """Gradients of the parameters from dk (D, L)."""
    table, _skips = _table(params, params)
    channels = params.channels
    sums = table.new_zeros(2, 1, channels, 4, table.shape[3], dtype=torch.float32)
    local = table.new_zeros(2, 1, channels, 1, dtype=torch.float32)
    dk = dk.to(torch.float32).contiguous()
    with torch.cuda.device_of(dk):
        generate_gradient_kernel[(channels,)](
            dk, table, sums, local, dk.shape[1], channels, 0, H=table.shape[3], num_warps=4
        )
    return _parameter_gradient(params, params, table, sums, local)[0]


class _Cut:
    """How (batch, sequence) is cut into programs, and the launches over it."""

    def __init__(self, u: Tensor, channels: int, segments: int | None) -> None:
        self.batch, self.length, self.channels = u.shape[0], u.shape[1], channels
        self.blocks = triton.cdiv(self.batch, BLOCK_B)
        if segments is None:
            segments = _segments(u.device, self.blocks * triton.cdiv(channels, 8) * 2, self.length)
        self.span = triton.cdiv(triton.cdiv(self.length, segments), CHUNK_MAX) * CHUNK_MAX
        self.segments = triton.cdiv(self.length, self.span)
        self.wide = u.dtype == torch.float32
        self.fixed = {
            "BB": BLOCK_B,
            "KIND": _KIND[u.dtype],
            "ROUND": INTERPRETED and u.dtype == torch.bfloat16,
            "PRECISION": "tf32x3" if self.wide else "tf32",
        }

    def _grid(self, directions: int) -> Callable[[dict[str, int]], tuple[int, int, int]]:
        return lambda meta: (triton.cdiv(self.channels, meta["DB"]), self.blocks * self.segments, directions)

    def starts(self, x: Tensor, step: int, table: Tensor, fields: int, flip: int) -> Tensor:
        """End states of all segments (2, segments, B, D, fields, H) float32; empty where nothing is cut."""
        if self.segments == 1:
            return table.new_empty(0, dtype=torch.float32)
        states = table.shape[3]
        starts = table.new_empty(2, self.segments, self.batch, self.channels, fields, states, dtype=torch.float32)
        with torch.cuda.device_of(x):
            kernel = _segment if fields == 2 else _segment_derivative
            kernel[self.wide][self._grid(2)](
                x, starts, table, self.batch, self.length, self.channels, step, *x.stride(), self.span, self.segments,
                0, flip, FIELDS=fields, H=states, SPLIT=not self.wide and fields == 4, **self.fixed,
            )  # fmt: skip
        return starts

    def scan(
        self, x: Tensor, step: int, y: Tensor, y_step: int, starts: Tensor, table: Tensor, skips: Tensor,
        flip: int, directions: tuple[int, ...] = (0, 1), add: bool = False,
    ) -> None:  # fmt: skip
        """Fill (or, with `add`, add to) y with the scans of x in `directions`, which must be consecutive."""
        with torch.cuda.device_of(x):
            _scan[self.wide][self._grid(len(directions))](
                x, y, starts, table, skips, self.batch, self.length, self.channels, step, *x.stride(),
                y_step, *y.stride(), self.span, self.segments, directions[0], flip,
                ADD=add, H=table.shape[3], **self.fixed,
            )  # fmt: skip

    def gradient(
        self, u: Tensor, step: int, dy: Tensor, dy_step: int, starts: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Partial sums (2, parts, D, 4, H) and the lags inside a chunk (2, parts, D, CHUNK_MAX), float32."""
        parts, states = self.blocks * self.segments, table.shape[3]
        sums = table.new_empty(2, parts, self.channels, 4, states, dtype=torch.float32)
        # A chunk shorter than CHUNK_MAX leaves the rest untouched, so it must be zero.
        local = table.new_zeros(2, parts, self.channels, CHUNK_MAX, dtype=torch.float32)
        with torch.cuda.device_of(u):
            _gradient[self.wide][self._grid(2 * (states // _SHARE))](
                u, dy, starts, table, sums, local, self.batch, self.length, self.channels, step, *u.stride(),
                dy_step, *dy.stride(), self.span, self.segments, LOCAL=CHUNK_MAX, H=states, HS=_SHARE,
                SPLIT=not self.wide, **self.fixed,
            )  # fmt: skip
        return sums, local


def _segments(device: torch.device, programs: int, length: int) -> int:
    """Pieces of each sequence: enough to fill the card, each long enough to pay for being read twice."""
    if device.type != "cuda":
        return 1
    cores = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(cores // programs, length // _SEGMENT_MIN))


def _stored(dtype: torch.dtype) -> torch.dtype:
    """What a kernel stores for outputs of `dtype`: that, but for bfloat16 in the interpreter (see `operand`)."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def _contiguous(params: SSMParams) -> SSMParams:
    return SSMParams(*(p.to(torch.float32).contiguous() for p in params))


def _padded(states: int) -> int:
    """States of the table: a power of two, at least 16, as matrix products want."""
    return max(16, triton.next_power_of_2(states))


def _table(forward: SSMParams, backward: SSMParams) -> tuple[Tensor, Tensor]:
    """Poles and weights of both directions (2, D, 4, H) float64, and the skips (2, D) float32."""
    f, b = _contiguous(forward), _contiguous(backward)
    channels, states = f.c.shape[0], f.c.shape[1]
    table = f.c.new_empty(2, channels, 4, _padded(states), dtype=torch.float64)
    skips = f.c.new_empty(2, channels)
    with torch.cuda.device_of(table):
        table_kernel[(triton.cdiv(channels, 4), 2)](
            *f, *b, table, skips, channels, states, DB=4, H=table.shape[3], num_warps=4
        )
    return table, skips


def _parameter_gradient(
    forward: SSMParams, backward: SSMParams, table: Tensor, sums: Tensor, local: Tensor
) -> tuple[SSMParams, SSMParams]:
    f, b = _contiguous(forward), _contiguous(backward)
    d_f = SSMParams(*(torch.empty_like(p) for p in f))
    d_b = SSMParams(*(torch.empty_like(p) for p in b))
    channels, states = f.c.shape[0], f.c.shape[1]
    with torch.cuda.device_of(table):
        parameter_gradient_kernel[(channels, 2)](
            *f[:5], *b[:5], table, sums, local, *d_f, *d_b, channels, states, sums.shape[1],
            LOCAL=local.shape[3], DB=1, H=table.shape[3], num_warps=4,
        )  # fmt: skip
    return (
        SSMParams(*(d.to(p.dtype) for d, p in zip(d_f, forward, strict=True))),
        SSMParams(*(d.to(p.dtype) for d, p in zip(d_b, backward, strict=True))),
    )
