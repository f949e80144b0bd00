"""The operator as torch.library custom ops: opaque to torch.compile, checkpointing and ZeRO, differentiable.

Each op has a fake kernel and a backward op of its own. Only u, the parameters and the (D, L) kernels are saved for the
backward pass. The last argument is the name of a backend, never `auto`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffussm.ops import registry
from diffussm.ops.params import SSMParams


def _no_autocast(x: Tensor) -> torch.autocast:
    # A custom op's body still sees the caller's autocast, which would turn the kernel's matrix product into bf16.
    return torch.autocast(x.device.type, enabled=False)


def _fused(name: str) -> registry.FusedBackend:
    backend = registry.get(name)
    if not isinstance(backend, registry.FusedBackend):
        raise TypeError(f"backend {name!r} has no fused operator")
    return backend


@torch.library.custom_op("diffussm::ssm_kernel", mutates_args=())
def ssm_kernel(
    log_dt: Tensor, log_a_real: Tensor, a_imag: Tensor, b: Tensor, c: Tensor, skip: Tensor, length: int, backend: str
) -> Tensor:
    """(D, length): see `diffussm.ops.ssm_kernel`."""
    with _no_autocast(c):
        return registry.get(backend).kernel(SSMParams(log_dt, log_a_real, a_imag, b, c, skip), length)


@ssm_kernel.register_fake
def _(
    log_dt: Tensor, log_a_real: Tensor, a_imag: Tensor, b: Tensor, c: Tensor, skip: Tensor, length: int, backend: str
) -> Tensor:
    return c.new_empty(c.shape[0], length)


@torch.library.custom_op("diffussm::ssm_kernel_backward", mutates_args=())
def ssm_kernel_backward(
    dk: Tensor,
    log_dt: Tensor,
    log_a_real: Tensor,
    a_imag: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six parameters from dk (D, L)."""
    with _no_autocast(c):
        g = registry.get(backend).kernel_backward(dk, SSMParams(log_dt, log_a_real, a_imag, b, c, skip))
    return g.log_dt, g.log_a_real, g.a_imag, g.b, g.c, g.skip


@ssm_kernel_backward.register_fake
def _(
    dk: Tensor,
    log_dt: Tensor,
    log_a_real: Tensor,
    a_imag: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(log_dt), _empty(log_a_real), _empty(a_imag), _empty(b), _empty(c), _empty(skip)


def _kernel_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *params, _length, ctx.backend = inputs
    ctx.save_for_backward(*params)


def _kernel_grad(ctx: Any, dk: Tensor) -> tuple[Tensor | None, ...]:
    return (*ssm_kernel_backward(dk, *ctx.saved_tensors, ctx.backend), None, None)


ssm_kernel.register_autograd(_kernel_grad, setup_context=_kernel_setup)


class KeptKernel(torch.autograd.Function):
    """A kernel that was made before, as the function of the parameters it was made from; gradients as `ssm_kernel`."""

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, backend: str, *params: Tensor) -> Tensor:
        """kernel (D, L) again."""
        ctx.backend = backend
        ctx.save_for_backward(*params)
        return kernel.view_as(kernel)

    @staticmethod
    def backward(ctx: Any, dk: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of the six parameters from dk (D, L)."""
        return (None, None, *ssm_kernel_backward(dk, *ctx.saved_tensors, ctx.backend))


@torch.library.custom_op("diffussm::bidirectional_conv", mutates_args=())
def bidirectional_conv(u: Tensor, k_f: Tensor, k_b: Tensor, backend: str) -> Tensor:
    """y (B, L, 2D): see `diffussm.ops.bidirectional_conv`."""
    if u.numel() == 0:
        return _output(u, k_f.shape[0])
    with _no_autocast(u):
        return registry.get(backend).conv(u, k_f, k_b)


@bidirectional_conv.register_fake
def _(u: Tensor, k_f: Tensor, k_b: Tensor, backend: str) -> Tensor:
    return _output(u, k_f.shape[0])


@torch.library.custom_op("diffussm::bidirectional_conv_backward", mutates_args=())
def bidirectional_conv_backward(
    dy: Tensor, u: Tensor, k_f: Tensor, k_b: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """du, dk_f and dk_b from dy (B, L, 2D)."""
    if u.numel() == 0:
        return _empty(u), torch.zeros_like(k_f), torch.zeros_like(k_b)
    with _no_autocast(u):
        return registry.get(backend).conv_backward(dy, u, k_f, k_b)


@bidirectional_conv_backward.register_fake
def _(dy: Tensor, u: Tensor, k_f: Tensor, k_b: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(u), _empty(k_f), _empty(k_b)


def _conv_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    u, k_f, k_b, ctx.backend = inputs
    ctx.save_for_backward(u, k_f, k_b)


def _conv_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return (*bidirectional_conv_backward(dy, *ctx.saved_tensors, ctx.backend), None)


bidirectional_conv.register_autograd(_conv_grad, setup_context=_conv_setup)


@torch.library.custom_op("diffussm::bidirectional_ssm", mutates_args=())
def bidirectional_ssm(u: Tensor, forward: list[Tensor], backward: list[Tensor], backend: str) -> Tensor:
    """y (B, L, 2D) from the six parameters of each direction; only for backends with a fused operator."""
    if u.numel() == 0:
        return _output(u, forward[0].shape[0])
    with _no_autocast(u):
        return _fused(backend).ssm(u, SSMParams(*forward), SSMParams(*backward))


@bidirectional_ssm.register_fake
def _(u: Tensor, forward: list[Tensor], backward: list[Tensor], backend: str) -> Tensor:
    return _output(u, forward[0].shape[0])


@torch.library.custom_op("diffussm::bidirectional_ssm_backward", mutates_args=())
def bidirectional_ssm_backward(
    dy: Tensor, u: Tensor, forward: list[Tensor], backward: list[Tensor], backend: str
) -> list[Tensor]:
    """du and the gradients of the twelve parameters, forward direction first."""
    if u.numel() == 0:
        return [_empty(u), *(torch.zeros_like(p) for p in (*forward, *backward))]
    with _no_autocast(u):
        du, d_forward, d_backward = _fused(backend).ssm_backward(dy, u, SSMParams(*forward), SSMParams(*backward))
    return [du, *d_forward, *d_backward]


@bidirectional_ssm_backward.register_fake
def _(dy: Tensor, u: Tensor, forward: list[Tensor], backward: list[Tensor], backend: str) -> list[Tensor]:
    return [_empty(t) for t in (u, *forward, *backward)]


def _ssm_setup(ctx: Any, inputs: tuple[Tensor, list[Tensor], list[Tensor], str], output: Tensor) -> None:
    u, forward, backward, ctx.backend = inputs
    ctx.save_for_backward(u, *forward, *backward)


def _ssm_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | list[Tensor] | None, ...]:
    u, *params = ctx.saved_tensors
    du, *grads = bidirectional_ssm_backward(dy, u, params[:6], params[6:], ctx.backend)
    return du, grads[:6], grads[6:], None


bidirectional_ssm.register_autograd(_ssm_grad, setup_context=_ssm_setup)


def _empty(like: Tensor) -> Tensor:
    """Contiguous whatever the strides of `like`: what every backend returns."""
    return like.new_empty(like.shape)


def _output(u: Tensor, channels: int) -> Tensor:
    return u.new_empty(u.shape[0], u.shape[1], 2 * channels)
