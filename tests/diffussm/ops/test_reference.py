import cmath
import math

import pytest
import torch

from diffussm.ops import bidirectional_conv, ssm_kernel
from diffussm.ops.parity import example

CPU = torch.device("cpu")


def test_kernel_is_the_formula_state_by_state() -> None:
    _, params, _ = example(1, 6, 2, 3, CPU, torch.float64, shared=True)
    k = ssm_kernel(params, 6, backend="reference")
    for d in range(2):
        dt = math.exp(params.log_dt[d].item())
        for step in range(6):
            total = params.skip[d].item() if step == 0 else 0.0
            for n in range(3):
                a = complex(-math.exp(params.log_a_real[d, n].item()), params.a_imag[d, n].item())
                b, c = complex(*params.b[d, n].tolist()), complex(*params.c[d, n].tolist())
                total += 2 * (c * b * (cmath.exp(dt * a) - 1) / a * cmath.exp(step * dt * a)).real
            assert k[d, step].item() == pytest.approx(total, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_convolution_is_the_definition_position_by_position(shared: bool) -> None:
    length, channels = 5, 2
    u, _, _ = example(2, length, channels, 1, CPU, torch.float64, shared)
    k_f, k_b = torch.randn(2, channels, length, dtype=torch.float64)
    y = bidirectional_conv(u, k_f, k_b, backend="reference")
    for t in range(length):
        for d in range(channels):
            ahead, back = u[:, :, d], u[:, :, d if shared else channels + d]
            forward = sum(k_f[d, t - s] * ahead[:, s] for s in range(t + 1))
            backward = sum(k_b[d, s - t] * back[:, s] for s in range(t, length))
            torch.testing.assert_close(y[:, t, d], forward)
            torch.testing.assert_close(y[:, t, channels + d], backward)


def test_bf16_input_is_computed_wide_and_rounded_once() -> None:
    u, _, _ = example(1, 33, 2, 1, CPU, torch.bfloat16, shared=True)
    k = torch.randn(2, 33)
    exact = bidirectional_conv(u.double(), k.double(), k.double(), backend="reference")
    assert torch.equal(bidirectional_conv(u, k, k, backend="reference"), exact.to(torch.bfloat16))
