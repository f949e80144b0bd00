"""Triton kernels under the interpreter, against float64. Run by test_triton.py in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton

from diffussm.ops import SSMParams, bidirectional_ssm, parity, ssm_kernel
from diffussm.ops import triton_launch as launch
from diffussm.ops.parity import example, relative_error, tolerance
from diffussm.ops.reference import BACKEND as REFERENCE
from tests.diffussm.ops import checks
from tests.diffussm.ops.checks import wide

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_second_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases are the check; running the backend's own parity check first would take a minute."""
    assert launch.INTERPRETED
    monkeypatch.setattr(parity, "check", lambda *_, **__: None)


@pytest.mark.parametrize(
    ("batch", "length", "channels", "states", "shared", "dtype"),
    [
        pytest.param(2, 37, 5, 4, True, torch.float32, id="odd length, two blocks of channels"),
        pytest.param(2, 1, 3, 32, False, torch.float32, id="one position"),
        pytest.param(17, 20, 1, 32, False, torch.float32, id="two blocks of sequences", marks=pytest.mark.long),
        pytest.param(2, 40, 3, 20, True, torch.bfloat16, id="bfloat16"),
        pytest.param(2, 40, 3, 16, False, torch.float16, id="float16", marks=pytest.mark.long),
        pytest.param(1, 700, 2, 32, True, torch.float32, id="many chunks", marks=pytest.mark.long),
    ],
)
def test_agrees_with_float64(
    batch: int, length: int, channels: int, states: int, shared: bool, dtype: torch.dtype
) -> None:
    checks.accuracy("triton", batch, length, channels, states, shared, dtype)


@pytest.mark.parametrize("check", [checks.causality, checks.adjoint, checks.flip_symmetry, checks.linearity])
@pytest.mark.long
def test_property(check: Callable[[str], None]) -> None:
    check("triton")


@pytest.mark.parametrize(("length", "pieces"), [(70, 2), pytest.param(150, 3, marks=pytest.mark.long)])
def test_segments_change_nothing(length: int, pieces: int) -> None:
    """A sequence cut in pieces gives what one piece gives: states, and the derivative states of the gradients, join."""
    u, forward, backward = example(1, length, 1, 4, CPU, torch.float32, shared=False)
    dy = torch.randn(1, length, 2, generator=torch.Generator().manual_seed(0))
    y, y_cut = (launch.forward(u, forward, backward, segments=s) for s in (1, pieces))
    assert relative_error(y_cut, y) < 1e-6
    du, *grads = launch.backward(dy, u, forward, backward, segments=1)
    du_cut, *grads_cut = launch.backward(dy, u, forward, backward, segments=pieces)
    assert relative_error(du_cut, du) < 1e-6
    for found, expected in zip(grads_cut, grads, strict=True):
        for name, a, b in zip(SSMParams._fields, found, expected, strict=True):
            assert relative_error(a, b) < 1e-5, name


def test_transposed_layout() -> None:
    """u may lie as (B, D, L) in memory."""
    u, forward, backward = example(2, 17, 3, 4, CPU, torch.float32, shared=False)
    across = u.transpose(1, 2).contiguous().transpose(1, 2)
    assert not across.is_contiguous()
    assert torch.equal(launch.forward(across, forward, backward), launch.forward(u, forward, backward))


@pytest.mark.long
def test_transposed_layout_in_the_gradient() -> None:
    """dy may lie as (B, 2D, L) in memory as well."""
    u, forward, backward = example(2, 17, 3, 4, CPU, torch.float32, shared=False)
    dy = torch.randn(2, 17, 6, generator=torch.Generator().manual_seed(0))
    across = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (u, dy)]
    found = launch.backward(across[1], across[0], forward, backward)
    expected = launch.backward(dy, u, forward, backward)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].c, expected[1].c)


def test_empty_batch() -> None:
    _, forward, backward = example(1, 5, 3, 4, CPU, torch.float32, shared=True)
    assert bidirectional_ssm(torch.empty(0, 5, 3), forward, backward, backend="triton").shape == (0, 5, 6)


@pytest.mark.parametrize("length", [70, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2100))])
def test_kernel_and_its_gradient(length: int) -> None:
    _, params, _ = example(1, length, 5, 32, CPU, torch.float32, shared=True)
    on_output, on_gradient = tolerance(torch.float32)
    leaves = SSMParams(*(p.detach().requires_grad_() for p in params))
    k = ssm_kernel(leaves, length, backend="triton")
    assert relative_error(k.detach(), REFERENCE.kernel(wide(params), length)) < on_output
    dk = torch.randn(k.shape, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad(k, list(leaves), dk)
    for name, found, expected in zip(
        SSMParams._fields, grads, REFERENCE.kernel_backward(dk.double(), wide(params)), strict=True
    ):
        assert relative_error(found, expected) < on_gradient, name


@pytest.mark.long
@pytest.mark.parametrize("config", launch.CONFIGS["scan"][False], ids=str)
def test_every_scan_config(config: triton.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = {True: triton.autotune([config], key=[])(launch.scan_kernel)}
    monkeypatch.setattr(launch, "_scan", tuned)
    u, forward, backward = example(1, 80, 2, 4, CPU, torch.float32, shared=False)
    y = launch.forward(u, forward, backward)
    k_f, k_b = REFERENCE.kernel(wide(forward), 80), REFERENCE.kernel(wide(backward), 80)
    assert relative_error(y, REFERENCE.conv(u.double(), k_f, k_b)) < tolerance(torch.float32)[0]


@pytest.mark.long
@pytest.mark.parametrize("config", launch.CONFIGS["gradient"][False], ids=str)
def test_every_gradient_config(config: triton.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = {True: triton.autotune([config], key=[])(launch.gradient_kernel)}
    monkeypatch.setattr(launch, "_gradient", tuned)
    checks.accuracy("triton", 1, 80, 2, 4, False, torch.float32)
