import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from diffussm.errors import MissingError
from diffussm.ops import registry
from diffussm.ops.triton import BACKEND

ROOT = Path(__file__).parents[3]


def interpret(selection: str) -> None:
    """Run triton_cases.py in a process of its own: Triton reads the variable once, when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", selection]
    done = subprocess.run(
        [*command, "tests/diffussm/ops/triton_cases.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_in_the_interpreter() -> None:
    interpret("not long")


@pytest.mark.long
def test_all_kernels_in_the_interpreter() -> None:
    interpret("long")


def test_without_a_card_it_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(MissingError, match="needs a CUDA device, not cpu"):
        registry.resolve("triton", torch.device("cpu"), torch.float32)


def test_float64_is_refused_with_the_reason() -> None:
    assert "float64" in (BACKEND.available(torch.device("cuda"), torch.float64) or "")


def test_a_convolution_that_cuda_cannot_serve_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Shapes alone, by fake tensors: no card is asked."""
    monkeypatch.setattr(registry, "verdict", lambda name, *_: registry.Verdict(name, False, "no NVRTC"))
    with FakeTensorMode(), caplog.at_level("WARNING", logger="diffussm.ops"):
        u = torch.empty(2, 16, 8, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(8, 16, device="cuda")
        for _ in range(2):
            assert BACKEND.conv(u, k, k).shape == (2, 16, 16)
        BACKEND.conv(u.float(), k, k)  # cuda is for half precision: nothing is amiss
    (line,) = [record.getMessage() for record in caplog.records]
    assert "convolves by torch's FFT, not by cuda: no NVRTC" in line
