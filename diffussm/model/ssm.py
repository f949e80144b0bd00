"""The bidirectional state-space layer: parameters of both directions, and the kernels kept while sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffussm.ops import SSMParams, bidirectional_conv, bidirectional_ssm, kept_kernel, ssm_kernel, uses_kernels

_STEP_MIN, _STEP_MAX = 1e-3, 1e-1
"""Range of the initial step, as in S4D."""


class BiSSM(nn.Module):
    """y (B, L, 2D) from u (B, L, 2D): the first half runs forward, the second half over the reversed sequence.

    One state-space model for each channel and direction, S4D-Lin initialisation (arXiv 2206.11893). Parameters hold
    the forward direction at index 0 and the backward direction at index 1. All stay fp32, even under
    `module.bfloat16()`, and take no weight decay: each carries `_optim` for whoever builds the optimiser.

    In evaluation mode without gradients the (D, L) kernels are made once and kept: 2 D L floats for each layer. They
    are dropped when a parameter is written, replaced, moved or loaded, when the module is put into or out of training
    mode, and by any pass with gradients. A write that goes around torch's bookkeeping (`parameter.data.copy_`, a raw
    pointer) between two passes in evaluation mode cannot be seen: call `drop_kernels(model)` after it.

    With gradients they are kept only inside `fixed_parameters(model)`, as over the micro batches of one step.
    """

    def __init__(self, width: int, state: int, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        pairs = state // 2
        # Log-uniform steps: from the start some channels of every layer see neighbours, others the whole picture.
        log_dt = torch.rand(2, width) * math.log(_STEP_MAX / _STEP_MIN) + math.log(_STEP_MIN)
        one = torch.tensor([1.0, 0.0])
        self.log_dt = nn.Parameter(log_dt)  # (2, D)
        self.log_a_real = nn.Parameter(torch.full((2, width, pairs), math.log(0.5)))  # (2, D, N/2)
        self.a_imag = nn.Parameter((math.pi * torch.arange(pairs)).repeat(2, width, 1))  # (2, D, N/2)
        self.b = nn.Parameter(one.repeat(2, width, pairs, 1))  # (2, D, N/2, 2)
        self.c = nn.Parameter(torch.randn(2, width, pairs, 2) * math.sqrt(0.5))  # (2, D, N/2, 2): E|c|^2 = 1
        self.skip = nn.Parameter(torch.randn(2, width))  # (2, D)
        self._mark()
        self._kept: _Kept | None = None
        self._fixed: dict[int, tuple[Tensor, ...]] | None = None  # length -> kernels, inside fixed_parameters

    def forward(self, u: Tensor) -> Tensor:
        """u (B, L, 2D) -> (B, L, 2D) in u's dtype."""
        if torch.compiler.is_compiling():  # a graph has no place for the cache
            return bidirectional_ssm(u, *self._directions(), backend=self.backend)
        if self.training or torch.is_grad_enabled():
            self._kept = None
            if self._fixed is not None and uses_kernels(u, self.backend):
                kernels = self._fixed_kernels(self._fixed, u.shape[1])
                return bidirectional_conv(u, *kernels, backend=self.backend)
            return bidirectional_ssm(u, *self._directions(), backend=self.backend)
        k_f, k_b = self._kernels(u.shape[1])
        return bidirectional_conv(u, k_f, k_b, backend=self.backend)

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train; drops the kernels."""
        self._kept = None
        return super().train(mode)

    def _directions(self) -> tuple[SSMParams, SSMParams]:
        forward, backward = zip(*(p.unbind(0) for p in self._tensors()), strict=True)
        return SSMParams(*forward), SSMParams(*backward)

    def _tensors(self) -> SSMParams:
        return SSMParams(self.log_dt, self.log_a_real, self.a_imag, self.b, self.c, self.skip)

    def _kernels(self, length: int) -> tuple[Tensor, Tensor]:
        params = self._tensors()
        kept = self._kept
        if kept is not None and kept.fits(params, length, self.backend):
            return kept.forward, kept.backward
        k_f, k_b = (ssm_kernel(p, length, backend=self.backend) for p in self._directions())
        # Tensors made in inference mode count no versions: nothing could tell that they changed.
        traceable = not any(p.is_inference() for p in params)
        self._kept = _Kept.of(params, length, self.backend, k_f, k_b) if traceable else None
        return k_f, k_b

    def _fixed_kernels(self, fixed: dict[int, tuple[Tensor, ...]], length: int) -> list[Tensor]:
        """As `_kernels`, with gradients; the same graph whether they are new or kept, as checkpointing needs."""
        directions = self._directions()
        if length not in fixed:
            with torch.no_grad():
                fixed[length] = tuple(ssm_kernel(p, length, backend=self.backend) for p in directions)
        pairs = zip(fixed[length], directions, strict=True)
        return [kept_kernel(k, p, backend=self.backend) for k, p in pairs]

    def _mark(self) -> None:
        for p in self._tensors():
            p._optim = {"weight_decay": 0.0, "fp32": True}  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Every `.to()`, `.cuda()`, `.bfloat16()` comes here: follow the device, keep fp32, drop the kernels."""
        self._kept = None

        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        super()._apply(keep_precision, recurse)
        self._mark()  # a move to another kind of device makes new Parameter objects
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_fixed": None}  # a copy of the module makes its own kernels


@dataclass(frozen=True)
class _Kept:
    """Kernels, and exactly what they were made from."""

    sources: tuple[Tensor, ...]
    """Aliases of the parameters: they keep the memory, so that its address cannot come to mean something else."""
    versions: tuple[int, ...]
    length: int
    backend: str
    forward: Tensor
    backward: Tensor

    @classmethod
    def of(cls, params: SSMParams, length: int, backend: str, forward: Tensor, backward: Tensor) -> _Kept:
        return cls(
            tuple(p.detach() for p in params), tuple(p._version for p in params), length, backend, forward, backward
        )

    def fits(self, params: SSMParams, length: int, backend: str) -> bool:
        return (length, backend) == (self.length, self.backend) and all(
            p.data_ptr() == s.data_ptr()
            and p.shape == s.shape
            and p.dtype == s.dtype
            and p.device == s.device
            and not p.is_inference()
            and p._version == v
            for p, s, v in zip(params, self.sources, self.versions, strict=True)
        )


def drop_kernels(model: nn.Module) -> None:
    """Forget the kernels kept by every state-space layer of `model`."""
    for module in model.modules():
        if isinstance(module, BiSSM):
            module._kept = None


@contextmanager
def fixed_parameters(model: nn.Module) -> Iterator[None]:
    """Make every layer's kernels once for all passes in this block, those with gradients and recomputed ones included.

    The caller promises that no parameter changes before the block's last pass: nothing is compared, since DeepSpeed
    writes parameters where torch does not count it. All kernels are dropped at the end.
    """
    layers = [module for module in model.modules() if isinstance(module, BiSSM)]
    for layer in layers:
        layer._fixed = {}
    try:
        yield
    finally:
        for layer in layers:
            layer._fixed = None
