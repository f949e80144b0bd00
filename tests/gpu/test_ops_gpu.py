"""The operator on a real card: every backend against float64, and what they reach. `make gpu-test` runs it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton

from diffussm.ops import SSMParams, bidirectional_conv, bidirectional_ssm, registry, ssm_kernel
from diffussm.ops.parity import example, relative_error, tolerance
from diffussm.ops.torch import BACKEND as TORCH
from tests.diffussm.ops import checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

GPU = torch.device("cuda")
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_takes_triton_after_a_parity_check(dtype: torch.dtype) -> None:
    found = registry.verdict("triton", GPU, dtype)
    assert found.usable, found.reason
    assert registry.resolve("auto", GPU, dtype).name == "triton"


@pytest.mark.parametrize("dtype", HALVES)
def test_cuda_passes_its_parity_check(dtype: torch.dtype) -> None:
    found = registry.verdict("cuda", GPU, dtype)
    assert found.usable, found.reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "shared"),
    [(1, 1, 3, True), (2, 37, 5, False), (17, 200, 9, True), (3, 1024, 24, False), (2, 1777, 16, True)],
)
def test_agrees_with_float64(
    backend: str, batch: int, length: int, channels: int, shared: bool, dtype: torch.dtype
) -> None:
    checks.accuracy(backend, batch, length, channels, 32, shared, dtype, GPU)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("length", [1, 300, 1024, 1025, 4096])
@pytest.mark.parametrize("channels", [8, 13])
def test_cuda_convolution(length: int, channels: int, dtype: torch.dtype) -> None:
    for shared in (True, False):
        u, forward, backward = example(3, length, channels, 32, GPU, dtype, shared)
        k_f, k_b = ssm_kernel(forward, length, backend="torch"), ssm_kernel(backward, length, backend="torch")
        exact = TORCH.conv(u.double(), k_f.double(), k_b.double())
        for x in (u, u.transpose(1, 2).contiguous().transpose(1, 2)):
            y = bidirectional_conv(x, k_f, k_b, backend="cuda")
            assert relative_error(y, exact) < tolerance(dtype)[0]
    k_f.mul_(2)  # the kept transforms must follow
    y = bidirectional_conv(u, k_f, k_b, backend="cuda")
    assert relative_error(y, TORCH.conv(u.double(), k_f.double(), k_b.double())) < tolerance(dtype)[0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("length", [1, 70, 1024, 4096])
def test_kernels_and_their_gradients(length: int, backend: str) -> None:
    _, params, _ = example(1, length, 13, 32, GPU, torch.float32, shared=True)
    on_output, on_gradient = tolerance(torch.float32)
    leaves = SSMParams(*(p.detach().requires_grad_() for p in params))
    k = ssm_kernel(leaves, length, backend=backend)
    exact = checks.wide(params)
    assert relative_error(k.detach(), TORCH.kernel(exact, length)) < on_output
    dk = torch.randn(13, length, generator=torch.Generator().manual_seed(0)).to(GPU)
    grads = torch.autograd.grad(k, list(leaves), dk)
    for name, found, expected in zip(SSMParams._fields, grads, TORCH.kernel_backward(dk.double(), exact), strict=True):
        assert relative_error(found, expected) < on_gradient, name


@pytest.mark.parametrize("family", ["scan", "gradient"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffussm.ops import triton_launch as launch

    wide = dtype == torch.float32
    kernels = {"scan": ("_scan", launch.scan_kernel), "gradient": ("_gradient", launch.gradient_kernel)}
    for config in launch.CONFIGS[family][wide]:
        name, kernel = kernels[family]
        monkeypatch.setattr(launch, name, {wide: triton.autotune([config], key=[])(kernel)})
        checks.accuracy("triton", 2, 333, 9, 32, True, dtype, GPU)


@pytest.mark.parametrize("pieces", [2, 5])
def test_segments_change_nothing(pieces: int) -> None:
    from diffussm.ops import triton_launch as launch

    u, forward, backward = example(2, 1000, 9, 32, GPU, torch.float32, shared=False)
    dy = torch.randn(2, 1000, 18, device=GPU)
    y, y_cut = (launch.forward(u, forward, backward, segments=s) for s in (1, pieces))
    assert relative_error(y_cut, y) < 5e-6
    du, *grads = launch.backward(dy, u, forward, backward, segments=1)
    du_cut, *grads_cut = launch.backward(dy, u, forward, backward, segments=pieces)
    assert relative_error(du_cut, du) < 5e-6
    for found, expected in zip(grads_cut, grads, strict=True):
        for name, a, b in zip(SSMParams._fields, found, expected, strict=True):
            assert relative_error(a, b) < 2e-5, name


def test_runs_repeat_bit_for_bit() -> None:
    u, forward, backward = example(4, 1024, 16, 32, GPU, torch.bfloat16, shared=False)
    dy = torch.randn(4, 1024, 32, device=GPU, dtype=torch.bfloat16)
    first = checks.run("triton", u, forward, backward, dy)
    for _ in range(5):
        again = checks.run("triton", u, forward, backward, dy)
        for a, b in zip((first[0], first[1], *first[2]), (again[0], again[1], *again[2]), strict=True):
            assert torch.equal(a, b)


def test_compiles_and_passes_opcheck() -> None:
    u, forward, backward = example(2, 64, 8, 32, GPU, torch.bfloat16, shared=False)
    compiled = torch.compile(bidirectional_ssm, fullgraph=True)
    expected = bidirectional_ssm(u, forward, backward, backend="triton")
    assert torch.equal(compiled(u, forward, backward, backend="triton"), expected)
    params = [p.requires_grad_() for p in (*forward, *backward)]
    args = (u.requires_grad_(), params[:6], params[6:], "triton")
    torch.library.opcheck(torch.ops.diffussm.bidirectional_ssm, args, atol=1e-2, rtol=1e-2)


def test_saved_tensors_keep_the_budget() -> None:
    u, forward, backward = example(2, 1024, 64, 32, GPU, torch.bfloat16, shared=False)
    saved = 0

    def pack(x: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += x.numel() * x.element_size()
        return x

    params = [p.requires_grad_() for p in (*forward, *backward)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        bidirectional_ssm(u.requires_grad_(), SSMParams(*params[:6]), SSMParams(*params[6:]), backend="triton")
    assert saved <= u.numel() * 2 + 24 * 64 * 1024


def _milliseconds(run: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median"))


def _timings(name: str, batch: int, length: int) -> tuple[float, float, float]:
    """Milliseconds of the forward, of forward and backward, and of the convolution with kernels kept; XL, bfloat16."""
    u, forward, backward = example(batch, length, 1152, 32, GPU, torch.bfloat16, shared=True)
    dy = torch.randn(batch, length, 2304, device=GPU, dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (u.clone(), *forward, *backward)]

    def once() -> torch.Tensor:
        return bidirectional_ssm(leaves[0], SSMParams(*leaves[1:7]), SSMParams(*leaves[7:]), backend=name)

    both = _milliseconds(lambda: torch.autograd.grad(once(), leaves, dy))
    with torch.no_grad():
        k_f, k_b = (ssm_kernel(p, length, backend=name) for p in (forward, backward))
        kept = _milliseconds(lambda: bidirectional_conv(u, k_f, k_b, backend=name))
        return _milliseconds(once), both, kept


def test_speed_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """Share of the card's copy bandwidth: a bfloat16 forward has to move 6 bytes an element (u in, y out)."""
    block = torch.empty(2**28, dtype=torch.int8, device=GPU)
    target = torch.empty_like(block)
    copied = 2 * block.numel() / _milliseconds(lambda: target.copy_(block))  # bytes a millisecond
    lines = [f"{torch.cuda.get_device_name()}: copy {copied / 1e6:.0f} GB/s"]
    for batch, length in ((8, 1024), (32, 1024), (8, 4096)):
        ideal = 6 * batch * length * 1152 / copied
        for name in ("torch", "triton"):
            ahead, both, kept = _timings(name, batch, length)
            lines.append(
                f"B {batch:3} L {length:5} {name:7} forward {ahead:7.3f} ms ({ideal / ahead:5.1%} of copy)  "
                f"forward and backward {both:7.3f} ms  kernels kept {kept:7.3f} ms ({ideal / kept:5.1%})"
            )
    with capsys.disabled():
        print("\n" + "\n".join(lines))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_network_gives_the_same_numbers_with_every_backend(checkpointing: bool) -> None:
    """Forward, all gradients, and sampling with kernels kept, under bfloat16 autocast and in float32."""
    from diffussm.config.schema import ModelConfig
    from diffussm.model import LatentShape, build_model

    latent = LatentShape(channels=4, height=16, width=16, classes=5)
    x = torch.randn(3, 4, 16, 16, device=GPU)
    t, y = torch.tensor([1, 500, 999], device=GPU), torch.tensor([0, 5, 2], device=GPU)
    torch.manual_seed(0)
    models = {
        name: build_model(ModelConfig(preset="tiny", backend=name), latent, activation_checkpointing=checkpointing).to(
            GPU
        )
        for name in ("torch", "triton")
    }
    with torch.no_grad():  # a fresh network answers zero whatever the operator does
        for p in models["torch"].parameters():
            p.add_(0.02 * torch.randn_like(p))
    models["triton"].load_state_dict(models["torch"].state_dict())
    for half in (False, True):
        results = {}
        for name, model in models.items():
            model.train().zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                out = model(x, t, y)
            out.square().mean().backward()
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=half):
                sampled = model.eval()(x, t, y)
            results[name] = [out.detach(), sampled, *grads]
        limit = 5e-2 if half else 1e-3
        for found, expected in zip(results["triton"], results["torch"], strict=True):
            assert relative_error(found, expected) < limit
