from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffussm.ops import SSMParams, bidirectional_conv, bidirectional_ssm, ssm_kernel
from diffussm.ops.parity import example, relative_error
from diffussm.ops.torch import _fft_length
from tests.diffussm.ops import checks

CPU = torch.device("cpu")
NAMES = ["reference", "torch"]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 2, 37, 64, 200])
def test_agrees_with_float64(length: int, dtype: torch.dtype, shared: bool) -> None:
    checks.accuracy("torch", 2, length, 5, 4, shared, dtype)


def test_agrees_with_float64_at_full_state_and_length() -> None:
    checks.accuracy("torch", 1, 1024, 3, 32, False, torch.float32)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 90), st.integers(4, 9), st.integers(2, 6), st.booleans())
def test_agrees_with_float64_at_any_size(batch: int, length: int, channels: int, states: int, shared: bool) -> None:
    checks.accuracy("torch", batch, length, channels, states, shared, torch.float32)


@pytest.mark.parametrize("check", checks.PROPERTIES)
@pytest.mark.parametrize("backend", NAMES)
def test_property(backend: str, check: Callable[[str], None]) -> None:
    check(backend)


def test_small_steps_keep_their_digits() -> None:
    """(exp(dt A) - 1)/A by plain subtraction would be wrong in the fourth digit here."""
    _, params, _ = example(1, 1, 4, 1, CPU, torch.float32, shared=True)
    params = params._replace(
        log_dt=torch.full((4,), -9.0), a_imag=torch.full((4, 1), 0.1), skip=torch.zeros(4), log_a_real=torch.zeros(4, 1)
    )
    expected = ssm_kernel(checks.wide(params), 4, backend="reference")
    assert relative_error(ssm_kernel(params, 4, backend="torch"), expected) < 1e-6


def test_gradients_of_small_steps_keep_their_digits() -> None:
    for dt in (-9.0, -6.0, -1.0, 0.0):
        _, params, _ = example(1, 1, 4, 3, CPU, torch.float32, shared=True)
        params = SSMParams(*(p.requires_grad_() for p in params._replace(log_dt=torch.full((4,), dt))))
        exact = SSMParams(*(p.detach().requires_grad_() for p in checks.wide(params)))
        dk = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
        found = torch.autograd.grad(ssm_kernel(params, 2, backend="torch"), params, dk)
        expected = torch.autograd.grad(ssm_kernel(exact, 2, backend="reference"), exact, dk.double())
        for name, a, b in zip(SSMParams._fields, found, expected, strict=True):
            assert relative_error(a, b) < 1e-5, (name, dt)


@given(st.integers(1, 100_000))
def test_fft_length_holds_all_lags_and_has_small_factors(length: int) -> None:
    n = _fft_length(length)
    assert n % 2 == 0
    assert 2 * length <= n <= 4 * length
    for factor in (2, 3, 5):
        while n % factor == 0:
            n //= factor
    assert n == 1


def test_the_callers_precision_switches_change_nothing() -> None:
    u, forward, _ = example(2, 64, 8, 32, CPU, torch.float32, shared=True)
    expected = ssm_kernel(forward, 64, backend="torch")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            k = ssm_kernel(forward, 64, backend="torch")
            y = bidirectional_conv(u, k, k, backend="torch")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert y.dtype == k.dtype == torch.float32
    assert torch.equal(k, expected)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_in_float64(backend: str, shared: bool) -> None:
    u, forward, backward = example(2, 6, 2, 2, CPU, torch.float64, shared)
    inputs = [x.requires_grad_() for x in (u, *forward, *backward)]

    def op(u: torch.Tensor, *p: torch.Tensor) -> torch.Tensor:
        return bidirectional_ssm(u, SSMParams(*p[:6]), SSMParams(*p[6:]), backend=backend)

    assert torch.autograd.gradcheck(op, inputs)
