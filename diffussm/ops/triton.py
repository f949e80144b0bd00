"""The operator on a GPU in Triton: chunked scans from parameters to output, nothing of size (D, L) in memory.

Forward, gradient of u and gradients of all parameters are each one pass over the sequences (two where a small batch
leaves the card idle and the sequence is cut). Kernels for `ssm_kernel` are made on the card as well. A convolution with
arbitrary kernels has no state-space form: it goes through the CUDA backend where that is usable, else torch's FFT.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from diffussm.ops.params import SSMParams
from diffussm.ops.torch import TorchBackend

log = logging.getLogger("diffussm.ops")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)


class TritonBackend(TorchBackend):
    """Chunked scan; CUDA cards of compute capability 8.0 and above, or any machine under Triton's interpreter."""

    name = "triton"

    def available(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if it runs there; else which of package, device, card or dtype is missing."""
        if dtype not in _DTYPES:
            return f"dtype {dtype} is not one of float32, bfloat16 and float16"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        # As Triton itself reads it when it is imported; asked here without that import, which takes a second.
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return None
        if device.type != "cuda":
            return f"it needs a CUDA device, not {device.type}"
        if torch.version.cuda is None:
            return "this torch was not built for CUDA"
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        return None

    def kernel(self, params: SSMParams, length: int) -> Tensor:
        """(D, length) float32 kernels with the skip at l = 0."""
        from diffussm.ops import triton_launch

        return triton_launch.generate(params, length)

    def kernel_backward(self, dk: Tensor, params: SSMParams) -> SSMParams:
        """Gradients of the parameters from dk (D, L)."""
        from diffussm.ops import triton_launch

        return triton_launch.generate_gradient(dk, params)

    def conv(self, u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
        """y (B, L, 2D) from u and the kernels (D, L): by the CUDA backend, else torch's FFT, with a warning why."""
        from diffussm.ops import cuda, registry

        if u.device.type == "cuda" and cuda.served(u):
            found = registry.verdict("cuda", u.device, u.dtype)
            if found.usable:
                return cuda.BACKEND.conv(u, k_f, k_b)
            _warn_once(u.device, u.dtype, found.reason)
        return super().conv(u, k_f, k_b)

    def ssm(self, u: Tensor, forward: SSMParams, backward: SSMParams) -> Tensor:
        """y (B, L, 2D) from u (B, L, D) or (B, L, 2D) with any strides."""
        from diffussm.ops import triton_launch

        return triton_launch.forward(u, forward, backward)

    def ssm_backward(
        self, dy: Tensor, u: Tensor, forward: SSMParams, backward: SSMParams
    ) -> tuple[Tensor, SSMParams, SSMParams]:
        """du like u, and the gradients of both directions' parameters."""
        from diffussm.ops import triton_launch

        return triton_launch.backward(dy, u, forward, backward)


@functools.cache
def _warn_once(device: torch.device, dtype: torch.dtype, reason: str) -> None:
    log.warning("backend triton on %s with %s convolves by torch's FFT, not by cuda: %s", device, dtype, reason)


BACKEND = TritonBackend()
