"""What every backend must satisfy, as functions of its name: the suites of all backends and the mutants share them."""

from __future__ import annotations

import torch
from torch import Tensor

from diffussm.ops import SSMParams, bidirectional_conv, bidirectional_ssm, ssm_kernel
from diffussm.ops.parity import example, relative_error, tolerance

CPU = torch.device("cpu")


def run(
    backend: str, u: Tensor, forward: SSMParams, backward: SSMParams, dy: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, du and the twelve parameter gradients, through the public function and autograd."""
    u = u.detach().requires_grad_()
    params = [p.detach().requires_grad_() for p in (*forward, *backward)]
    y = bidirectional_ssm(u, SSMParams(*params[:6]), SSMParams(*params[6:]), backend=backend)
    du, *grads = torch.autograd.grad(y, [u, *params], dy)
    return y.detach(), du, grads


def wide(params: SSMParams) -> SSMParams:
    """The same numbers in float64."""
    return SSMParams(*(p.double() for p in params))


def accuracy(
    backend: str,
    batch: int,
    length: int,
    channels: int,
    states: int,
    shared: bool,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> None:
    """Output and all gradients agree with float64 within the dtype's tolerance."""
    u, forward, backward = example(batch, length, channels, states, device, dtype, shared)
    generator = torch.Generator().manual_seed(length)
    dy = torch.randn(batch, length, 2 * channels, generator=generator).to(device, dtype)
    y, du, grads = run(backend, u, forward, backward, dy)
    y_64, du_64, grads_64 = run("reference", u.double(), wide(forward), wide(backward), dy.double())
    on_output, on_gradient = tolerance(dtype)
    assert y.dtype == du.dtype == dtype
    assert y.is_contiguous()
    assert du.shape == u.shape
    assert relative_error(y, y_64) < on_output
    assert relative_error(du, du_64) < on_gradient
    for name, grad, expected in zip(SSMParams._fields * 2, grads, grads_64, strict=True):
        assert grad.shape == expected.shape
        assert grad.dtype == forward.c.dtype
        assert relative_error(grad, expected) < on_gradient, name


def impulse(backend: str, length: int = 23, channels: int = 3) -> None:
    """An impulse at 0 gives k_f; one at L-1 gives k_b reversed."""
    k_f, k_b = torch.randn(2, channels, length, generator=torch.Generator().manual_seed(0))
    first, last = torch.zeros(2, 1, length, channels)
    first[:, 0] = 1
    last[:, -1] = 1
    y_f = bidirectional_conv(first, k_f, k_b, backend=backend)[0, :, :channels]  # (L, D)
    y_b = bidirectional_conv(last, k_f, k_b, backend=backend)[0, :, channels:]  # (L, D)
    torch.testing.assert_close(y_f, k_f.t(), atol=1e-5, rtol=0)
    torch.testing.assert_close(y_b, k_b.flip(1).t(), atol=1e-5, rtol=0)


def causality(backend: str, length: int = 37) -> None:
    """A change of u at s moves the forward output only from s on, the backward output only up to s."""
    u, forward, backward = example(1, length, 3, 4, CPU, torch.float32, shared=True)
    changed, at = u.clone(), length // 2
    changed[:, at] += 1
    moved = bidirectional_ssm(changed, forward, backward, backend=backend)
    moved = (moved - bidirectional_ssm(u, forward, backward, backend=backend)).abs()[0]  # (L, 2D)
    assert moved[:at, :3].max() < 1e-4 < moved[at:, :3].max()
    assert moved[at + 1 :, 3:].max() < 1e-4 < moved[: at + 1, 3:].max()


def flip_symmetry(backend: str) -> None:
    """Reversing the sequence and exchanging the directions' parameters and inputs reverses and exchanges the output."""
    u, forward, backward = example(2, 29, 3, 4, CPU, torch.float32, shared=False)
    y = bidirectional_ssm(u, forward, backward, backend=backend)
    swapped = bidirectional_ssm(u.flip(1).roll(3, 2), backward, forward, backend=backend)
    torch.testing.assert_close(swapped.flip(1).roll(3, 2), y, atol=1e-4, rtol=1e-4)


def adjoint(backend: str) -> None:
    """<A u, v> = <u, A* v>, with A* what the backward pass computes."""
    for shared in (True, False):
        u, forward, backward = example(2, 31, 3, 4, CPU, torch.float32, shared)
        v = torch.randn(2, 31, 6, generator=torch.Generator().manual_seed(1))
        y, du, _ = run(backend, u, forward, backward, v)
        torch.testing.assert_close((y * v).sum(), (u * du).sum(), atol=1e-3, rtol=1e-4)
        assert du.abs().max() > 0.1


def linearity(backend: str) -> None:
    """The output is linear in u."""
    u, forward, backward = example(2, 31, 3, 4, CPU, torch.float32, shared=False)
    v = torch.randn(u.shape, generator=torch.Generator().manual_seed(1))
    whole = bidirectional_ssm(2 * u - 3 * v, forward, backward, backend=backend)
    parts = [bidirectional_ssm(x, forward, backward, backend=backend) for x in (u, v)]
    torch.testing.assert_close(whole, 2 * parts[0] - 3 * parts[1], atol=2e-3, rtol=1e-4)


def skip_at_zero(backend: str) -> None:
    """The kernel's first entry, and no other, carries the skip."""
    _, params, _ = example(1, 5, 3, 4, CPU, torch.float32, shared=True)
    bare = ssm_kernel(params._replace(skip=torch.zeros(3)), 7, backend=backend)
    difference = ssm_kernel(params, 7, backend=backend) - bare  # (D, L)
    torch.testing.assert_close(difference[:, 0], params.skip, atol=1e-5, rtol=1e-5)
    assert difference[:, 1:].abs().max() == 0


PROPERTIES = (impulse, causality, flip_symmetry, adjoint, linearity, skip_at_zero)
