import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
