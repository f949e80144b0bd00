"""The C++ backend against float64: sizes that break SIMD code, layouts, precisions, and what the operator must obey."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffussm.ops import SSMParams, bidirectional_conv, bidirectional_ssm, parity, ssm_kernel, textbook
from diffussm.ops.cpu import BACKEND
from diffussm.ops.reference import BACKEND as REFERENCE

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")

CPU = torch.device("cpu")


def output(u: Tensor, forward: SSMParams, backward: SSMParams) -> Tensor:
    """y, parameters to output."""
    return BACKEND.conv(u, BACKEND.kernel(forward, u.shape[1]), BACKEND.kernel(backward, u.shape[1]))


def gradients(dy: Tensor, u: Tensor, forward: SSMParams, backward: SSMParams) -> tuple[Tensor, SSMParams, SSMParams]:
    """du and the gradients of both directions' parameters."""
    k_f, k_b = BACKEND.kernel(forward, u.shape[1]), BACKEND.kernel(backward, u.shape[1])
    du, dk_f, dk_b = BACKEND.conv_backward(dy, u, k_f, k_b)
    return du, BACKEND.kernel_backward(dk_f, forward), BACKEND.kernel_backward(dk_b, backward)


def both_ways(
    u: Tensor, dy: Tensor, forward: SSMParams, backward: SSMParams
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients of the backend and of the reference."""
    found = parity._composed(BACKEND, u, dy, forward, backward)
    return found, parity._composed(REFERENCE, u, dy, forward, backward)


def assert_agrees(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    on_output, on_gradient = parity.tolerance(dtype)
    for name, right in expected.items():
        assert found[name].shape == right.shape, name
        assert found[name].dtype == right.dtype, name
        # A sum that cancels to nothing, as with L = 1, has no relative error to speak of.
        if right.norm() > 1e-6 * expected["y"].norm():
            error = parity.relative_error(found[name], right)
            assert error < (on_output if name == "y" else on_gradient), (name, error)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "states"),
    [(2, 1, 3, 2), (1, 2, 16, 1), (3, 15, 17, 3), (2, 16, 32, 4), (2, 33, 40, 4), (17, 64, 24, 5), (1, 300, 9, 32)],
)
def test_output_and_every_gradient_agree_with_float64(
    batch: int, length: int, channels: int, states: int, shared: bool
) -> None:
    u, forward, backward = parity.example(batch, length, channels, states, CPU, torch.float32, shared)
    dy = torch.randn(batch, length, 2 * channels, generator=torch.Generator().manual_seed(3))
    assert_agrees(*both_ways(u, dy, forward, backward), torch.float32)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 20),
    length=st.integers(1, 200),
    channels=st.integers(1, 40),
    shared=st.booleans(),
)
def test_any_shape_agrees_with_float64(batch: int, length: int, channels: int, shared: bool) -> None:
    u, forward, backward = parity.example(batch, length, channels, 3, CPU, torch.float32, shared)
    dy = torch.randn(batch, length, 2 * channels, generator=torch.Generator().manual_seed(4))
    assert_agrees(*both_ways(u, dy, forward, backward), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [True, False])
def test_half_precisions_agree_within_their_rounding(dtype: torch.dtype, shared: bool) -> None:
    u, forward, backward = parity.example(3, 70, 21, 4, CPU, dtype, shared)
    dy = torch.randn(3, 70, 42, generator=torch.Generator().manual_seed(5)).to(dtype)
    assert_agrees(*both_ways(u, dy, forward, backward), dtype)


def test_bf16_rounds_to_nearest_even_and_keeps_nan() -> None:
    # An impulse kernel makes the operator the identity: what comes out is the rounding of what went in. Its errors are
    # below half of a bf16 step, so every value must come back as it was.
    values = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(6)).bfloat16()
    impulse = torch.zeros(16, 16)
    impulse[:, 0] = 1
    y = BACKEND.conv(values, impulse, impulse)
    torch.testing.assert_close(y, torch.cat((values, values), dim=2), rtol=0, atol=1e-5)
    half = torch.full((1, 1, 16), 1 + 2**-8).bfloat16() * torch.tensor(1.0)  # exactly representable: 1
    scaled = BACKEND.conv(half, torch.full((16, 1), 1 + 2**-9), torch.full((16, 1), 1 + 3 * 2**-9))
    assert bool((scaled[..., :16] == 1).all())  # a quarter of a step above 1 goes down
    assert bool((scaled[..., 16:] == 1 + 2**-7).all())  # three quarters go up
    values[0, 0, 0] = float("nan")
    assert bool(BACKEND.conv(values, impulse, impulse)[0, :, 0].isnan().any())


@pytest.mark.parametrize("length", [1024, 2048, 4096])
def test_long_sequences_agree_with_the_textbook_in_float64(length: int) -> None:
    u, forward, backward = parity.example(1, length, 5, 32, CPU, torch.float32, True)
    wide = [SSMParams(*(p.double() for p in side)) for side in (forward, backward)]
    expected = textbook.bidirectional_ssm(u.double(), *wide)
    assert parity.relative_error(output(u, forward, backward), expected) < 5e-6
    found = BACKEND.kernel_backward(torch.randn(5, length, generator=torch.Generator().manual_seed(7)), forward)
    leaves = [p.double().requires_grad_() for p in forward]
    k = textbook.kernel(SSMParams(*leaves), length)
    dk = torch.randn(5, length, generator=torch.Generator().manual_seed(7)).double()
    for got, right in zip(found[:5], torch.autograd.grad(k, leaves[:5], dk), strict=True):
        assert parity.relative_error(got, right) < 2e-5


def test_an_impulse_shows_the_kernels_and_causality() -> None:
    k_f, k_b = torch.randn(2, 11, 45, generator=torch.Generator().manual_seed(8))
    u = torch.zeros(2, 45, 11)
    u[0, 0], u[1, 44] = 1, 1
    y = BACKEND.conv(u, k_f, k_b)
    torch.testing.assert_close(y[0, :, :11], k_f.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y[1, :, 11:], k_b.T.flip(0), rtol=1e-5, atol=1e-5)
    assert y[0, 1:, 11:].abs().max() < 1e-5  # the backward direction sees nothing after an impulse at 0
    assert y[1, :44, :11].abs().max() < 1e-5


def test_strided_and_expanded_inputs_read_the_same_values() -> None:
    k_f, k_b = torch.randn(2, 20, 33, generator=torch.Generator().manual_seed(9))
    base = torch.randn(33, 3, 40, generator=torch.Generator().manual_seed(10))
    dy = torch.randn(33, 40, 3, generator=torch.Generator().manual_seed(11)).permute(2, 0, 1)
    views = {
        "transposed rows": base.transpose(0, 1)[..., 20:],
        "channels last but one": base.permute(1, 0, 2)[:, :, ::2],
        "expanded": base[:, :1, :20].transpose(0, 1).expand(3, -1, -1),
    }
    for name, u in views.items():
        assert not u.is_contiguous(), name
        assert torch.equal(BACKEND.conv(u, k_f, k_b), BACKEND.conv(u.contiguous(), k_f, k_b)), name
        strided = BACKEND.conv_backward(dy, u, k_f, k_b)
        plain = BACKEND.conv_backward(dy.contiguous(), u.contiguous(), k_f, k_b)
        assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True)), name


def test_an_empty_batch_gives_empty_output_and_zero_gradients() -> None:
    _, forward, backward = parity.example(1, 20, 18, 2, CPU, torch.float32, True)
    u, dy = torch.empty(0, 20, 18), torch.empty(0, 20, 36)
    assert output(u, forward, backward).shape == (0, 20, 36)
    du, *grads = gradients(dy, u, forward, backward)
    assert du.shape == u.shape
    assert all(float(g.abs().sum()) == 0 for side in grads for g in side)


def test_the_number_of_threads_changes_no_bit() -> None:
    u, forward, backward = parity.example(20, 40, 30, 4, CPU, torch.float32, True)
    dy = torch.randn(20, 40, 60, generator=torch.Generator().manual_seed(12))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            du, d_forward, d_backward = gradients(dy, u, forward, backward)
            results.append([output(u, forward, backward), du, *d_forward, *d_backward])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_flow_through_the_custom_ops() -> None:
    u, forward, backward = parity.example(2, 19, 6, 3, CPU, torch.float32, False)
    leaves = [t.clone().requires_grad_() for t in (u, *forward, *backward)]

    def loss(backend: str) -> list[Tensor]:
        y = bidirectional_ssm(leaves[0], SSMParams(*leaves[1:7]), SSMParams(*leaves[7:]), backend=backend)
        return list(torch.autograd.grad((y * y).sum(), leaves))

    for found, right in zip(loss("cpu"), loss("reference"), strict=True):
        assert parity.relative_error(found, right) < 2e-5
    k = [ssm_kernel(SSMParams(*leaves[i : i + 6]), 19, backend="cpu") for i in (1, 7)]
    y = bidirectional_conv(leaves[0], *k, backend="cpu")
    fused = bidirectional_ssm(leaves[0], SSMParams(*leaves[1:7]), SSMParams(*leaves[7:]), backend="cpu")
    assert parity.relative_error(y.detach(), fused.detach()) < 1e-6


def test_opcheck_and_compile_accept_the_backend() -> None:
    u, forward, backward = parity.example(2, 12, 5, 2, CPU, torch.float32, True)
    k = [BACKEND.kernel(p, 12).requires_grad_() for p in (forward, backward)]
    torch.library.opcheck(torch.ops.diffussm.bidirectional_conv.default, (u.requires_grad_(), *k, "cpu"))
    torch.library.opcheck(torch.ops.diffussm.ssm_kernel.default, (*(p.requires_grad_() for p in forward), 12, "cpu"))
    run = torch.compile(
        lambda x: bidirectional_ssm(x, forward, backward, backend="cpu"), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(run(u), bidirectional_ssm(u, forward, backward, backend="cpu"))


def test_it_refuses_what_it_cannot_serve() -> None:
    assert BACKEND.available(CPU, torch.float32) is None
    assert "float64" in str(BACKEND.available(CPU, torch.float64))
    assert "cuda" in str(BACKEND.available(torch.device("cuda"), torch.float32))
