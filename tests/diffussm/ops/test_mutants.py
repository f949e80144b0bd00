"""Wrong GPU kernels must not pass the checks that the right ones pass.

Mutants of the operator as a whole (zero output, zero du, swapped directions, a circular convolution and others) stand
in test_registry.py; stale spectra in test_cuda.py, a layer's stale kernels in ../model/test_ssm.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffussm.ops import cuda_nvrtc
from diffussm.ops.parity import example, relative_error, tolerance
from diffussm.ops.torch import BACKEND as TORCH
from tests.diffussm.ops import monarch

ROOT = Path(__file__).parents[3]

MONARCH = {
    "missing conjugate": (1, "r0 ^ n, r1 ^ n", "r0, r1"),
    "dropped twiddle": (1, "  twiddle(re, im, table + T_TWIDDLE, lane);\n", ""),
    "overflow folded back": (1, "table[T_OUT_IM", "table[T_OUT_RE"),
    "rows shifted": (1, "(kt * 16 + 8 * v + 2 * q + e) * ROW", "(kt * 16 + 8 * v + 2 * q + 1 - e) * ROW"),
    "scales of the warps not undone": (4, "const float undo = 1.0f / scale;", "const float undo = 1.0f;"),
    "butterfly turns the wrong way": (4, "yr[4] = {sr + tr, dr + ei,", "yr[4] = {sr + tr, dr - ei,"),
    "missing barrier": (4, "    sync_block();\n    const int tile", "    const int tile"),
}


def interpret(*options: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/diffussm/ops/mutant_cases.py"]
    done = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_wrong_triton_kernels_are_rejected() -> None:
    """Those that matter most; all of them in the long tests."""
    interpret("-k", "right_text or (wrong_scan and (dropped or swapped or shifted))")


@pytest.mark.long
def test_all_wrong_triton_kernels_are_rejected() -> None:
    interpret()


@pytest.mark.long
@pytest.mark.skipif(monarch.COMPILER is None, reason="no C++ compiler to run the CUDA source with")
@pytest.mark.parametrize("mutant", MONARCH)
def test_wrong_cuda_kernels_are_rejected(tmp_path: Path, mutant: str) -> None:
    subs, old, new = MONARCH[mutant]
    source = cuda_nvrtc.source()
    assert old in source, "the mutation no longer fits the source"
    library = monarch.build(tmp_path, subs, torch.float16, source.replace(old, new))
    u, forward, backward = example(1, 1024 * subs, 2, 8, torch.device("cpu"), torch.float16, shared=False)
    u[:, 1::4] *= 30  # residues of unlike size, so that each warp has a scale of its own
    k_f, k_b = TORCH.kernel(forward, u.shape[1]), TORCH.kernel(backward, u.shape[1])
    y = monarch.convolve(library, subs, u, k_f, k_b)
    exact = TORCH.conv(u.double(), k_f.double(), k_b.double())
    assert not relative_error(y, exact) < tolerance(torch.float16)[0]
