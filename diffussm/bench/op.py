"""Time the operator's backends against the textbook formula, all sides interleaved in one process.

On a CPU the clock is the process's CPU time, so that other work on the machine disturbs little; on an accelerator it is
the wall clock around a synchronised call. The caller sets the number of threads.
"""

from __future__ import annotations

import functools
import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffussm.bench.machine import free_bytes
from diffussm.ops import api, parity, registry, textbook
from diffussm.ops.params import SSMParams

log = logging.getLogger("diffussm.bench")

TEXTBOOK = "textbook"
MODES = ("forward", "forward+backward", "cached", "convolution")
"""What is timed: parameters to y; the same with all gradients; y with the kernels given, as in sampling, against the
textbook's whole forward; y with the kernels given, against the textbook's convolution alone."""

_TEXTBOOK_BYTES = 2 << 30
"""The textbook formula runs over slices of the channels whose complex powers and transforms stay below this."""
_FFT_BYTES = 80
"""Bytes an element that a gradient by torch's FFT keeps at once; a backend of that kind is left out if they are more
than the machine has."""
_ROUND_SECONDS = 0.02
"""A call that is shorter is repeated for this long in each round."""
_CHECKED_CHANNELS = 4
"""Channels whose output is compared with float64."""


@dataclass(frozen=True)
class Row:
    """One backend at one size and mode."""

    backend: str
    mode: str
    batch: int
    length: int
    channels: int
    ms: float
    """Median time of a call."""
    ms_low: float
    ms_high: float
    """Fastest and slowest call."""
    ns_per_element: float
    """Median over B L D."""
    bandwidth_share: float
    """Bytes of u, y and their gradients that a call must move, over what a plain copy moves in the same time."""
    saved_bytes: int
    """Bytes kept for the backward pass; 0 where there is none."""
    error: float
    """Relative L2 error of y against float64, on a few channels."""
    ratio: float
    """Textbook's median over this median."""


def bench(
    lengths: Sequence[int],
    batches: Sequence[int],
    channels: Sequence[int],
    *,
    backends: Sequence[str],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    states: int = 32,
    repeats: int = 5,
    modes: Sequence[str] = MODES,
) -> list[Row]:
    """One row for each backend (the textbook included), size and mode.

    Args:
        lengths: L. batches: B. channels: D; u is (B, L, D), read by both directions.
        backends: names; each must be usable on the device.
        device: where to run.
        dtype: of u.
        states: N/2.
        repeats: interleaved rounds after one call of warm-up (which counts as a round where it takes over a second).
        modes: out of `MODES`.

    Raises:
        ConfigError, MissingError: as `registry.resolve`.
        ValueError: an unknown mode.
    """
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode: found {mode!r}; allowed are {', '.join(MODES)}")
    for name in backends:
        registry.resolve(name, device, dtype)
    copy_rate = copy_bandwidth(device)
    rows: list[Row] = []
    for length in lengths:
        for width in channels:
            for batch in batches:
                case = _Case(batch, length, width, states, device, dtype)
                rows += _bench_case(case, modes, _fitting(case, backends), repeats, copy_rate)
                del case
                gc.collect()
    return rows


def copy_bandwidth(device: torch.device, size_bytes: int = 256 << 20) -> float:
    """Bytes a second that a plain copy moves, read and written both counted; best of five."""
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    times = [cpu_or_wall_seconds(lambda: target.copy_(source), device) for _ in range(6)]
    return 2 * size_bytes / min(times[1:])


class _Case:
    """Inputs of one size."""

    def __init__(
        self, batch: int, length: int, channels: int, states: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.batch, self.length, self.channels, self.states, self.device = batch, length, channels, states, device
        u, forward, backward = parity.example(batch, length, channels, states, device, dtype, shared=True)
        self.u = u.requires_grad_()  # (B, L, D)
        self.forward = SSMParams(*(p.requires_grad_() for p in forward))
        self.backward = SSMParams(*(p.requires_grad_() for p in backward))

    @functools.cached_property
    def dy(self) -> Tensor:
        """(B, L, 2D)"""
        return self.u.detach().flip(1).repeat(1, 1, 2)

    def expected(self) -> Tensor:
        """(1, L, 2 checked) in float64, of the first sequence and the first channels."""
        count = min(_CHECKED_CHANNELS, self.channels)
        u = self.u.detach()[:1, :, :count].double()
        forward, backward = (
            SSMParams(*(p.detach()[:count].double() for p in side)) for side in (self.forward, self.backward)
        )
        return textbook.bidirectional_ssm(u, forward, backward)

    def error(self, y: Tensor) -> float:
        """Relative L2 error of y (B, L, 2D) on what `expected` holds."""
        count = min(_CHECKED_CHANNELS, self.channels)
        found = torch.cat((y[:1, :, :count], y[:1, :, self.channels : self.channels + count]), dim=2)
        return parity.relative_error(found.detach(), self.expected())


def _fitting(case: _Case, backends: Sequence[str]) -> list[str]:
    """The backends without those whose transforms this machine has no memory for."""
    needed = _FFT_BYTES * case.u.numel()
    if case.device.type != "cpu" or needed < free_bytes() or "torch" not in backends:
        return list(backends)
    log.warning(
        "B %d, L %d, D %d: torch is left out, it needs about %.0f GiB",
        case.batch, case.length, case.channels, needed / 2**30,
    )  # fmt: skip
    return [name for name in backends if name != "torch"]


def _bench_case(
    case: _Case, modes: Sequence[str], backends: Sequence[str], repeats: int, copy_rate: float
) -> list[Row]:
    """All sides of one size in turn; the textbook's forward is the yardstick of two modes and is timed once."""
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for mode in modes:
        calls[_yardstick(mode)] = _textbook_call(case, mode)
        calls.update({(mode, name): _backend_call(case, mode, name) for name in backends})
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    count = dict.fromkeys(calls, 1)
    short = set()
    for key, call in calls.items():
        seconds = cpu_or_wall_seconds(call, case.device)
        if seconds > 1:
            times[key].append(1e3 * seconds)
        else:
            short.add(key)
            count[key] = max(3, round(_ROUND_SECONDS / max(cpu_or_wall_seconds(call, case.device), 1e-6)))
    for _ in range(repeats):
        for key, call in calls.items():
            if len(times[key]) < repeats:
                if key in short:  # else it would pay for memory that the side before it gave back to the system
                    call()
                times[key].append(1e3 * cpu_or_wall_seconds(call, case.device, count[key]))
    rows = []
    for mode in modes:
        base = statistics.median(times[_yardstick(mode)])
        rows += [_row(case, mode, TEXTBOOK, times[_yardstick(mode)], base, copy_rate)]
        rows += [_row(case, mode, name, times[mode, name], base, copy_rate) for name in backends]
    return rows


def _yardstick(mode: str) -> tuple[str, str]:
    return ("forward" if mode == "cached" else mode, TEXTBOOK)


def _row(case: _Case, mode: str, name: str, times: Sequence[float], base: float, copy_rate: float) -> Row:
    ms = statistics.median(times)
    elements = case.batch * case.length * case.channels
    # u and y once each; with gradients u, dy and du once more.
    moved = elements * case.u.element_size() * (3 + (4 if mode == "forward+backward" else 0))
    return Row(
        backend=name,
        mode=mode,
        batch=case.batch,
        length=case.length,
        channels=case.channels,
        ms=ms,
        ms_low=min(times),
        ms_high=max(times),
        ns_per_element=1e6 * ms / elements,
        bandwidth_share=moved / (copy_rate * ms / 1e3),
        saved_bytes=_saved_bytes(case, name) if mode == "forward+backward" else 0,
        error=_error(case, mode, name),
        ratio=base / ms,
    )


def _backend_call(case: _Case, mode: str, name: str) -> Callable[[], object]:
    if mode == "forward+backward":
        leaves = [case.u, *case.forward, *case.backward]

        def train() -> object:
            y = api.bidirectional_ssm(case.u, case.forward, case.backward, backend=name)
            return torch.autograd.grad(y, leaves, case.dy)

        return train
    if mode == "forward":
        return torch.no_grad()(lambda: api.bidirectional_ssm(case.u, case.forward, case.backward, backend=name))
    with torch.no_grad():
        k_f, k_b = (api.ssm_kernel(p, case.length, backend=name) for p in (case.forward, case.backward))
    return torch.no_grad()(lambda: api.bidirectional_conv(case.u, k_f, k_b, backend=name))


def _textbook_call(case: _Case, mode: str) -> Callable[[], object]:
    if mode == "convolution":
        with torch.no_grad():
            k_f, k_b = (_sliced_kernel(case, p) for p in (case.forward, case.backward))
        return torch.no_grad()(
            lambda: [textbook.bidirectional_conv(case.u[..., s], k_f[s], k_b[s]) for s in _slices(case)]
        )
    if mode == "forward+backward":
        return lambda: [_train_slice(case, s) for s in _slices(case)]
    return torch.no_grad()(
        lambda: [
            textbook.bidirectional_ssm(case.u[..., s], _part(case.forward, s), _part(case.backward, s))
            for s in _slices(case)
        ]
    )


def _train_slice(case: _Case, s: slice) -> object:
    u = case.u.detach()[..., s].requires_grad_()
    forward, backward = (
        SSMParams(*(p.detach().requires_grad_() for p in _part(side, s))) for side in (case.forward, case.backward)
    )
    y = textbook.bidirectional_ssm(u, forward, backward)
    dy = torch.cat((case.dy[..., s], case.dy[..., case.channels :][..., s]), dim=2)
    return torch.autograd.grad(y, [u, *forward, *backward], dy)


def _sliced_kernel(case: _Case, params: SSMParams) -> Tensor:
    return torch.cat([textbook.kernel(_part(params, s), case.length) for s in _slices(case)])


def _part(params: SSMParams, s: slice) -> SSMParams:
    return SSMParams(*(p[s] for p in params))


def _slices(case: _Case) -> Iterable[slice]:
    # A channel's complex powers, or the transforms of its 2L points for all sequences at once.
    at_once = max(1, _TEXTBOOK_BYTES // (8 * case.length * max(case.states, 6 * case.batch)))
    return [slice(i, min(i + at_once, case.channels)) for i in range(0, case.channels, at_once)]


def _run(case: _Case, name: str) -> Tensor:
    if name == TEXTBOOK:
        return textbook.bidirectional_ssm(case.u, case.forward, case.backward)
    return api.bidirectional_ssm(case.u, case.forward, case.backward, backend=name)


def _error(case: _Case, mode: str, name: str) -> float:
    """Of the very path that was timed: with kernels given, a fused backend takes another one than without."""
    if name != TEXTBOOK and mode in ("cached", "convolution"):
        y = _backend_call(case, mode, name)()
        assert isinstance(y, Tensor)  # noqa: S101 - these modes give y
        return case.error(y)
    with torch.no_grad():
        if name == TEXTBOOK:
            part = slice(0, min(_CHECKED_CHANNELS, case.channels))
            y = textbook.bidirectional_ssm(case.u[:1, :, part], _part(case.forward, part), _part(case.backward, part))
            return parity.relative_error(y, case.expected())
        return case.error(_run(case, name))


def _saved_bytes(case: _Case, name: str) -> int:
    """Bytes of the distinct memory blocks that autograd keeps, the parameters' own excepted."""
    if name == TEXTBOOK and len(list(_slices(case))) > 1:
        return 0  # the sum over slices is never alive at once
    own = {p.untyped_storage().data_ptr() for p in (*case.forward, *case.backward)}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = _run(case, name)
    del y
    return sum(kept.values())


def cpu_or_wall_seconds(call: Callable[[], object], device: torch.device, count: int = 1) -> float:
    """Seconds of one call, the mean of `count`."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = clock()
    for _ in range(count):
        call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return (clock() - start) / count
