"""Wrong Triton kernels, made from the right text: the checks must reject each. Run by test_mutants.py, interpreted."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffussm.ops import SSMParams, parity, ssm_kernel
from diffussm.ops import triton_launch as launch
from diffussm.ops.parity import example, relative_error, tolerance
from diffussm.ops.reference import BACKEND as REFERENCE
from tests.diffussm.ops import checks

OPS = Path(launch.__file__).parent

SCAN: dict[str, tuple[str, str]] = {
    "dropped chunk state": ("        y += tl.dot(operand(hr, KIND, ROUND), pr, input_precision=PRECISION)\n", ""),
    "missing conjugate": ("operand(-ei, KIND, ROUND)", "operand(ei, KIND, ROUND)"),
    "shifted kernel": (
        "exponent = tl.where(reverse != 0, C - t, t + 1)",
        "exponent = tl.where(reverse != 0, C - t, t)",
    ),
    "swapped directions": ("reverse = direction ^ flip", "reverse = 1 - (direction ^ flip)"),
    "zero output": ("tl.store(out, operand(y, KIND, ROUND), mask=inside)", "tl.store(out, y * 0.0, mask=inside)"),
    "second direction overwrites the first's gradient": ("        if ADD:\n", "        if not ADD:\n"),
    "skip forgotten": ("k = tl.where(own == 0, k + skip[:, None], k)", "k = k"),
    "state never decays": ("hr, hi = multiply(wr, wi, hr, hi)", "hr, hi = hr, hi"),
}
GRADIENT: dict[str, tuple[str, str]] = {
    "missing conjugate": ("s0r += tl.sum(gr * hr - gi * hi, axis=1)", "s0r += tl.sum(gr * hr + gi * hi, axis=1)"),
    "derivative state dropped": (
        "dr, di = multiply(wr, wi, dr + hr * C, di + hi * C)",
        "dr, di = multiply(wr, wi, dr, di)",
    ),
    "half a step lost": ("er, ei = er * (weight + 0.5), ei * (weight + 0.5)", "er, ei = er * weight, ei * weight"),
    "chunks of the wrong direction": ("pos_u = tl.where(direction != 0, near, far)", "pos_u = far"),
}
PARAMS: dict[str, tuple[str, str]] = {
    "missing conjugate": ("gr, gi = s0r, -s0i  # g(c')", "gr, gi = s0r, s0i"),
    "A seen only through the exponent": ("gar, gai = dt * gxr - gar, dt * gxi - gai", "gar, gai = dt * gxr, dt * gxi"),
    "lags inside a chunk lost": ("s1r += tl.sum(er * step, axis=1).to(tl.float64)\n", "s1r += 0.0\n"),
}
GENERATE: dict[str, tuple[str, str]] = {
    "tile begins a lag too late": (
        "br, bi = far_power(decay, turns, first)",
        "br, bi = far_power(decay, turns, first + 1)",
    ),
    "missing conjugate": ("- tl.dot(pi, qi,", "+ tl.dot(pi, qi,"),
}


@pytest.fixture(autouse=True)
def _no_second_check(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.INTERPRETED
    monkeypatch.setattr(parity, "check", lambda *_, **__: None)


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def mutated(folder: Path, name: str, change: tuple[str, str]) -> Iterator[None]:
    """The Triton backend with one module's text changed, everything above it loaded anew."""
    text = (OPS / f"{name}.py").read_text()
    old, new = change
    assert text.count(old) >= 1, "the mutation no longer fits the source"
    path = folder / f"{name}.py"
    path.write_text(text.replace(old, new))
    import diffussm.ops as package

    stack = ["triton_scan", "triton_grad", "triton_params", "triton_generate", "triton_launch"]
    before = {n: sys.modules[f"diffussm.ops.{n}"] for n in stack}
    try:
        for n in stack:
            setattr(package, n, _load(f"diffussm.ops.{n}", path if n == name else OPS / f"{n}.py"))
        yield
    finally:
        for n, module in before.items():
            sys.modules[f"diffussm.ops.{n}"] = module
            setattr(package, n, module)


def whole() -> None:
    checks.accuracy("triton", 1, 40, 1, 4, True, torch.float32)  # three chunks: two would not let a state decay


def output_only() -> None:
    u, forward, backward = example(1, 40, 1, 4, torch.device("cpu"), torch.float32, shared=True)
    y = sys.modules["diffussm.ops.triton_launch"].forward(u, forward, backward)
    k_f, k_b = REFERENCE.kernel(checks.wide(forward), 40), REFERENCE.kernel(checks.wide(backward), 40)
    assert relative_error(y, REFERENCE.conv(u.double(), k_f, k_b)) < tolerance(torch.float32)[0]


def kernel_only() -> None:
    _, params, _ = example(1, 70, 1, 4, torch.device("cpu"), torch.float32, shared=True)
    k = ssm_kernel(SSMParams(*params), 70, backend="triton")
    assert relative_error(k, REFERENCE.kernel(checks.wide(params), 70)) < tolerance(torch.float32)[0]


def test_the_checks_pass_on_the_right_text(tmp_path: Path) -> None:
    """Loading a module from its text changes nothing: what fails below fails by the mutation."""
    with mutated(tmp_path, "triton_scan", ("", "")):
        whole()
        output_only()
        kernel_only()


@pytest.mark.parametrize("mutant", SCAN)
def test_wrong_scan_is_rejected(tmp_path: Path, mutant: str) -> None:
    only_gradient = mutant.startswith("second direction")
    with mutated(tmp_path, "triton_scan", SCAN[mutant]), pytest.raises(AssertionError):
        (whole if only_gradient else output_only)()


@pytest.mark.parametrize("mutant", GRADIENT)
def test_wrong_gradient_is_rejected(tmp_path: Path, mutant: str) -> None:
    with mutated(tmp_path, "triton_grad", GRADIENT[mutant]), pytest.raises(AssertionError):
        whole()


@pytest.mark.parametrize("mutant", PARAMS)
def test_wrong_parameter_gradient_is_rejected(tmp_path: Path, mutant: str) -> None:
    with mutated(tmp_path, "triton_params", PARAMS[mutant]), pytest.raises(AssertionError):
        whole()


@pytest.mark.parametrize("mutant", GENERATE)
def test_wrong_kernel_is_rejected(tmp_path: Path, mutant: str) -> None:
    with mutated(tmp_path, "triton_generate", GENERATE[mutant]), pytest.raises(AssertionError):
        kernel_only()
