"""Does a backend agree with the definition, on this device and in this precision?

The check runs the real code on a small input that has what breaks kernels: an odd length, a channel count that fills
no vector register, both input layouts, forward and every gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from diffussm.ops.params import SSMParams
from diffussm.ops.reference import BACKEND as REFERENCE

if TYPE_CHECKING:
    from diffussm.ops.registry import Backend, FusedBackend

_TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (5e-6, 2e-5),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (5e-3, 5e-3),
}
"""dtype of u -> largest relative L2 error of the output and of each gradient."""


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """Largest relative L2 error against float64 of the output, and of each gradient, for u of this dtype."""
    return _TOLERANCE[dtype]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the L2 norm; infinite when `found` is not finite everywhere."""
    found, expected = found.double(), expected.double()
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def example(
    batch: int, length: int, channels: int, states: int, device: torch.device, dtype: torch.dtype, shared: bool
) -> tuple[Tensor, SSMParams, SSMParams]:
    """Random u and parameters from a generator of their own, so that nothing else's random numbers move."""
    generator = torch.Generator().manual_seed(batch + 31 * length + 997 * channels)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def direction() -> SSMParams:
        params = SSMParams(
            log_dt=normal(channels) * 0.8 - 4.0,
            log_a_real=normal(channels, states) * 0.3 - 0.7,
            a_imag=torch.pi * torch.arange(states, dtype=torch.float64) + 0.3 * normal(channels, states),
            b=normal(channels, states, 2),
            c=normal(channels, states, 2),
            skip=normal(channels),
        )
        return SSMParams(*(p.to(device, wide) for p in params))

    u = normal(batch, length, channels if shared else 2 * channels).to(device, dtype)
    return u, direction(), direction()


def check(backend: Backend, device: torch.device, dtype: torch.dtype, *, fused: bool) -> str | None:
    """Run `backend` against the float64 reference; None if it agrees, else what disagrees and by how much.

    An exception of the backend is a failed check too: its text is the answer.
    """
    if dtype not in _TOLERANCE:
        return f"{dtype} is none of {', '.join(str(d) for d in _TOLERANCE)}"
    for shared in (False, True):
        for length in (37, 200):
            u, forward, backward = example(2, length, 5, 4, device, dtype, shared)
            dy = torch.randn(2, length, 10, generator=torch.Generator().manual_seed(1)).to(device, dtype)
            expected = _composed(REFERENCE, u, dy, forward, backward)
            try:
                results = [_composed(backend, u, dy, forward, backward)]
                if fused:
                    results.append(_fused(cast("FusedBackend", backend), u, dy, forward, backward))
            except (RuntimeError, ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
                return f"it raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            for found in results:
                failure = _compare(found, expected, dtype)
                if failure is not None:
                    return f"{failure}, at length {length}"
    return None


def _composed(b: Backend, u: Tensor, dy: Tensor, forward: SSMParams, backward: SSMParams) -> dict[str, Tensor]:
    k_f, k_b = b.kernel(forward, u.shape[1]), b.kernel(backward, u.shape[1])
    du, dk_f, dk_b = b.conv_backward(dy, u, k_f, k_b)
    return {
        "y": b.conv(u, k_f, k_b),
        "du": du,
        **_named("forward", b.kernel_backward(dk_f, forward)),
        **_named("backward", b.kernel_backward(dk_b, backward)),
    }


def _fused(b: FusedBackend, u: Tensor, dy: Tensor, forward: SSMParams, backward: SSMParams) -> dict[str, Tensor]:
    du, d_forward, d_backward = b.ssm_backward(dy, u, forward, backward)
    return {
        "y": b.ssm(u, forward, backward),
        "du": du,
        **_named("forward", d_forward),
        **_named("backward", d_backward),
    }


def _named(direction: str, grads: SSMParams) -> dict[str, Tensor]:
    return {f"d({direction}.{name})": grad for name, grad in grads._asdict().items()}


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> str | None:
    on_output, on_gradient = _TOLERANCE[dtype]
    for name, right in expected.items():
        if found[name].shape != right.shape:
            return f"{name} has shape {tuple(found[name].shape)}, expected {tuple(right.shape)}"
        error = relative_error(found[name], right)
        limit = on_output if name == "y" else on_gradient
        if error > limit:
            return f"parity check failed: {name} is off by {error:.2g} (relative L2), allowed is {limit:.2g}"
    return None
