"""The benchmark measures the right thing: rows, ratios, errors, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffussm.bench import op as bench
from diffussm.ops import SSMParams, parity, registry, textbook
from diffussm.ops.reference import BACKEND as REFERENCE
from diffussm.ops.torch import TorchBackend

CPU = torch.device("cpu")


@pytest.mark.parametrize("shared", [True, False])
def test_the_textbook_formula_is_the_reference(shared: bool) -> None:
    u, forward, backward = parity.example(2, 37, 5, 4, CPU, torch.float64, shared)
    expected = REFERENCE.conv(u, REFERENCE.kernel(forward, 37), REFERENCE.kernel(backward, 37))
    assert parity.relative_error(textbook.bidirectional_ssm(u, forward, backward), expected) < 1e-12
    k_f, k_b = (REFERENCE.kernel(p, 37) for p in (forward, backward))
    assert parity.relative_error(textbook.bidirectional_conv(u, k_f, k_b), expected) < 1e-12


def test_one_row_for_each_backend_mode_and_size() -> None:
    rows = bench.bench([8, 16], [1, 2], [4], backends=["torch"], device=CPU, states=2, repeats=1)
    assert len(rows) == 2 * 2 * len(bench.MODES) * 2
    for row in rows:
        assert row.ms_low <= row.ms <= row.ms_high
        assert row.error < 5e-6
        assert row.ns_per_element == pytest.approx(1e6 * row.ms / (row.batch * row.length * row.channels))
        assert (row.saved_bytes > 0) == (row.mode == "forward+backward")
        if row.backend == bench.TEXTBOOK:
            assert row.ratio == 1


def test_saved_bytes_stay_within_the_budget() -> None:
    rows = bench.bench([64], [8], [12], backends=["torch"], device=CPU, modes=["forward+backward"], repeats=1)
    ours = next(row for row in rows if row.backend == "torch")
    theirs = next(row for row in rows if row.backend == bench.TEXTBOOK)
    assert ours.saved_bytes <= 4 * 8 * 64 * 12 + 24 * 64 * 12
    assert theirs.saved_bytes > 3 * ours.saved_bytes


def test_a_wrong_output_shows_as_an_error() -> None:
    case = bench._Case(1, 16, 6, 2, CPU, torch.float32)
    y = textbook.bidirectional_ssm(case.u, case.forward, case.backward).detach()
    assert case.error(y) < 5e-6
    assert case.error(torch.zeros_like(y)) == pytest.approx(1)
    assert case.error(y.roll(6, dims=2)) > 0.1


class WrongConvolution(TorchBackend):
    """Right from parameters to output, wrong with kernels given."""

    name = "wrong-convolution"

    def conv(self, u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
        return torch.zeros_like(super().conv(u, k_f, k_b))

    def ssm(self, u: Tensor, forward: SSMParams, backward: SSMParams) -> Tensor:
        return super().conv(u, self.kernel(forward, u.shape[1]), self.kernel(backward, u.shape[1]))

    def ssm_backward(
        self, dy: Tensor, u: Tensor, forward: SSMParams, backward: SSMParams
    ) -> tuple[Tensor, SSMParams, SSMParams]:
        raise NotImplementedError


def test_the_error_is_that_of_the_path_that_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "check", lambda *_, **__: None)  # which would refuse it
    registry.register(WrongConvolution())
    try:
        modes = ["forward", "cached", "convolution"]
        rows = bench.bench(
            [8], [1], [4], backends=[WrongConvolution.name], device=CPU, states=2, repeats=1, modes=modes
        )
    finally:
        registry.unregister(WrongConvolution.name)
    errors = {row.mode: row.error for row in rows if row.backend == WrongConvolution.name}
    assert errors["forward"] < 5e-6
    assert errors["cached"] == errors["convolution"] == pytest.approx(1)


def test_slices_of_the_textbook_cover_all_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench._Case(1, 16, 7, 2, CPU, torch.float32)
    monkeypatch.setattr(bench, "_TEXTBOOK_BYTES", 2 * 8 * 6 * 16)  # two channels' transforms
    parts = list(bench._slices(case))
    assert [i for s in parts for i in range(s.start, s.stop)] == list(range(7))
    assert len(parts) == 4
    whole = SSMParams(*(p.detach() for p in case.forward))
    assert torch.allclose(bench._sliced_kernel(case, whole), textbook.kernel(whole, 16), atol=1e-6)


def test_the_textbook_forward_is_the_yardstick_of_both_forward_and_cached() -> None:
    rows = bench.bench([8], [1], [4], backends=["torch"], device=CPU, states=2, repeats=2)
    textbook_ms = {row.mode: row.ms for row in rows if row.backend == bench.TEXTBOOK}
    assert textbook_ms["forward"] == textbook_ms["cached"]
    assert {row.mode for row in rows if row.backend == "torch"} == set(bench.MODES)


def test_a_backend_without_memory_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda: 1000)
    rows = bench.bench([8], [1], [4], backends=["torch", "reference"], device=CPU, states=2, repeats=1)
    assert {row.backend for row in rows} == {bench.TEXTBOOK, "reference"}
    assert "torch is left out" in caplog.text


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="sideways"):
        bench.bench([4], [1], [2], backends=["torch"], device=CPU, modes=["sideways"])
