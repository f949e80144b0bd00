"""The operator's public functions: check the arguments, settle the backend, call the custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from diffussm.ops import library, registry
from diffussm.ops.params import SSMParams


def bidirectional_ssm(u: Tensor, forward: SSMParams, backward: SSMParams, *, backend: str = registry.AUTO) -> Tensor:
    """Run a state-space model over the sequence and another over the reversed sequence, from parameters to output.

    Args:
        u: (B, L, D), read by both directions; or (B, L, 2D), whose first D channels feed the forward and whose last D
            the backward direction. bf16, fp16, fp32 or float64.
        forward: parameters of the direction in which y[t] sees s <= t.
        backward: parameters of the direction in which y[t] sees s >= t.
        backend: `auto` or the name of a backend.

    Returns:
        (B, L, 2D) in u's dtype: output of the forward, then of the backward direction. Computed in fp32 (float64 if u
        or the parameters are), whatever autocast says.

    Raises:
        ValueError: shapes do not fit.
        ConfigError, MissingError: as `registry.resolve`.
    """
    _check_input(u, forward.channels)
    name = _resolved(backend, u.device, u.dtype)
    if _is_fused(name):
        return library.bidirectional_ssm(u, list(forward), list(backward), name)
    k_f = library.ssm_kernel(*forward, u.shape[1], name)  # (D, L)
    k_b = library.ssm_kernel(*backward, u.shape[1], name)  # (D, L)
    return library.bidirectional_conv(u, k_f, k_b, name)


def ssm_kernel(params: SSMParams, length: int, *, backend: str = registry.AUTO) -> Tensor:
    """Convolution kernels (D, length) of one direction, skip included at l = 0, in the parameters' dtype (fp32).

    Raises:
        ValueError: length < 1.
        ConfigError, MissingError: as `registry.resolve`.
    """
    if length < 1:
        raise ValueError(f"length: found {length}, allowed is 1 or more")
    return library.ssm_kernel(*params, length, _resolved(backend, params.c.device, params.c.dtype))


def uses_kernels(u: Tensor, backend: str = registry.AUTO) -> bool:
    """Whether `bidirectional_ssm` makes (D, L) kernels for u, which may be kept, or goes past them in one pass.

    Raises:
        ConfigError, MissingError: as `registry.resolve`.
    """
    return not _is_fused(_resolved(backend, u.device, u.dtype))


def kept_kernel(kernel: Tensor, params: SSMParams, *, backend: str = registry.AUTO) -> Tensor:
    """A (D, L) kernel made before by `ssm_kernel(params, L)`, with its gradients; computes nothing forward.

    The caller sees to it that the parameters have not changed since.

    Raises:
        ConfigError, MissingError: as `registry.resolve`.
    """
    name = _resolved(backend, params.c.device, params.c.dtype)
    kept: Tensor = library.KeptKernel.apply(kernel, name, *params)
    return kept


def bidirectional_conv(u: Tensor, k_f: Tensor, k_b: Tensor, *, backend: str = registry.AUTO) -> Tensor:
    """Convolve with k_f in the forward and with k_b in the reversed direction.

    Args:
        u: as in `bidirectional_ssm`.
        k_f: (D, L) causal kernels of the forward direction.
        k_b: (D, L) kernels of the backward direction.
        backend: `auto` or the name of a backend.

    Returns:
        (B, L, 2D) in u's dtype.

    Raises:
        ValueError: shapes do not fit.
        ConfigError, MissingError: as `registry.resolve`.
    """
    _check_input(u, k_f.shape[0])
    if k_f.shape != k_b.shape or k_f.shape[1] != u.shape[1]:
        raise ValueError(
            f"kernels: found {tuple(k_f.shape)} and {tuple(k_b.shape)}; both must be (D, L), L = {u.shape[1]} as in u"
        )
    name = _resolved(backend, u.device, u.dtype)
    if _nobody_watches(u, k_f, k_b):
        return registry.get(name).conv(u, k_f, k_b)
    return library.bidirectional_conv(u, k_f, k_b, name)


def _nobody_watches(*tensors: Tensor) -> bool:
    """Whether the custom op around a backend would do nothing but take time, as in sampling.

    It takes 40 to 120 us, more than the convolution itself of a small network. Its work is wanted for gradients,
    tracing, dispatch modes (fake tensors, counters), function transforms, tensor subclasses, autocast, empty input.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.is_autocast_enabled(tensors[0].device.type)
        or any(type(t) is not Tensor or not t.numel() or t.is_meta for t in tensors)
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def _check_input(u: Tensor, channels: int) -> None:
    if u.dim() != 3 or u.shape[1] < 1 or u.shape[2] not in (channels, 2 * channels):
        raise ValueError(
            f"u: found shape {tuple(u.shape)}; allowed are (B, L, {channels}) and (B, L, {2 * channels}), L >= 1"
        )


# Tracing needs the choice as a constant: the parity check itself cannot be traced.
@torch.compiler.assume_constant_result
def _resolved(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    return registry.resolve(backend, device, dtype).name


@torch.compiler.assume_constant_result
def _is_fused(name: str) -> bool:
    return isinstance(registry.get(name), registry.FusedBackend)
