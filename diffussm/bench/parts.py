"""Where a forward and backward pass of the operator spends its time: the backend's four functions, one by one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from diffussm.bench.op import cpu_or_wall_seconds
from diffussm.ops import parity, registry
from diffussm.ops.params import SSMParams

ROUND_CALLS = 3
"""Calls of a part in a round, after one that is not timed."""


@dataclass(frozen=True)
class PartRow:
    """One part at one size: milliseconds, and its share of the sum of the parts."""

    backend: str
    part: str
    batch: int
    length: int
    channels: int
    ms: float
    ms_low: float
    ms_high: float
    share: float


def bench_parts(
    length: int, batch: int, width: int, *, backends: Sequence[str], rounds: int, device: torch.device
) -> list[PartRow]:
    """Both directions' kernels, the convolution, its gradients and the parameters' gradients, in turns; fp32.

    A backend that goes from parameters to output in one pass uses its kernels for sampling only, and its parts here do
    not add up to its time in training.
    """
    u, forward, backward = parity.example(batch, length, width, 32, device, torch.float32, shared=True)
    dy = u.flip(1).repeat(1, 1, 2)  # (B, L, 2D)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name in backends:
        backend = registry.resolve(name, device, torch.float32)
        k_f, k_b = backend.kernel(forward, length), backend.kernel(backward, length)  # (D, L) each
        _, dk_f, dk_b = backend.conv_backward(dy, u, k_f, k_b)
        calls |= _parts(name, backend, (u, dy), (forward, backward), (k_f, k_b), (dk_f, dk_b))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            call()
            times[key].append(1e3 * cpu_or_wall_seconds(call, device, ROUND_CALLS))
    medians = {key: statistics.median(values) for key, values in times.items()}
    sums = {name: sum(ms for (owner, _), ms in medians.items() if owner == name) for name in backends}
    return [
        PartRow(
            name, part, batch, length, width, medians[name, part], min(values), max(values),
            medians[name, part] / sums[name],
        )
        for (name, part), values in times.items()
    ]  # fmt: skip


def _parts(
    name: str,
    backend: registry.Backend,
    tensors: tuple[torch.Tensor, torch.Tensor],
    sides: tuple[SSMParams, SSMParams],
    kernels: tuple[torch.Tensor, torch.Tensor],
    gradients: tuple[torch.Tensor, torch.Tensor],
) -> dict[tuple[str, str], Callable[[], object]]:
    (u, dy), length = tensors, tensors[0].shape[1]
    return {
        (name, "kernels"): lambda: [backend.kernel(side, length) for side in sides],
        (name, "convolution"): lambda: backend.conv(u, *kernels),
        (name, "convolution backward"): lambda: backend.conv_backward(dy, u, *kernels),
        (name, "kernels backward"): lambda: [
            backend.kernel_backward(dk, side) for dk, side in zip(gradients, sides, strict=True)
        ],
    }
