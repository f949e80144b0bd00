from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from diffussm.ops import SSMParams, bidirectional_conv, bidirectional_ssm, library, registry, ssm_kernel
from diffussm.ops.parity import example
from diffussm.ops.torch import TorchBackend

CPU = torch.device("cpu")


class FusedTorch(TorchBackend):
    """From parameters to output by the torch backend: stands for a backend with a fused operator."""

    name = "fused-torch"

    def ssm(self, u: Tensor, forward: SSMParams, backward: SSMParams) -> Tensor:
        return self.conv(u, self.kernel(forward, u.shape[1]), self.kernel(backward, u.shape[1]))

    def ssm_backward(
        self, dy: Tensor, u: Tensor, forward: SSMParams, backward: SSMParams
    ) -> tuple[Tensor, SSMParams, SSMParams]:
        kernels = self.kernel(forward, u.shape[1]), self.kernel(backward, u.shape[1])
        du, dk_f, dk_b = self.conv_backward(dy, u, *kernels)
        return du, self.kernel_backward(dk_f, forward), self.kernel_backward(dk_b, backward)


@pytest.fixture
def fused() -> Iterator[str]:
    registry.register(FusedTorch())
    yield FusedTorch.name
    registry.unregister(FusedTorch.name)


@pytest.fixture(params=["reference", "torch", "fused-torch"])
def backend(request: pytest.FixtureRequest, fused: str) -> str:
    return request.param


def op(u: Tensor, params: list[Tensor], backend: str) -> Tensor:
    return bidirectional_ssm(u, SSMParams(*params[:6]), SSMParams(*params[6:]), backend=backend)


def inputs(batch: int = 2, length: int = 7, shared: bool = False) -> tuple[Tensor, list[Tensor]]:
    u, forward, backward = example(batch, length, 3, 2, CPU, torch.float32, shared)
    return u.requires_grad_(), [p.requires_grad_() for p in (*forward, *backward)]


def gradients(y: Tensor, u: Tensor, params: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((y.float() ** 2).sum(), [u, *params]))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_ops_pass_torchs_own_checks(name: str, shared: bool) -> None:
    u, params = inputs(shared=shared)
    kernels = [torch.randn(3, 7, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(library.ssm_kernel, (*params[:6], 7, name))
    torch.library.opcheck(library.bidirectional_conv, (u, *kernels, name))
    torch.library.opcheck(library.bidirectional_conv, (u.detach().transpose(0, 1), *(k[:, :2] for k in kernels), name))


def test_fused_op_passes_torchs_own_checks(fused: str) -> None:
    u, params = inputs()
    torch.library.opcheck(library.bidirectional_ssm, (u, params[:6], params[6:], fused))


def test_fused_op_gives_what_the_composed_one_gives(fused: str) -> None:
    u, params = inputs()
    ours, theirs = op(u, params, fused), op(u, params, "torch")
    assert torch.equal(ours, theirs)
    for a, b in zip(gradients(ours, u, params), gradients(theirs, u, params), strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_as_one_graph_and_gives_the_same_numbers(backend: str) -> None:
    u, params = inputs()
    expected = op(u, params, backend)
    wanted = gradients(expected, u, params)
    torch._dynamo.reset()
    registry.forget()  # the choice must be possible while tracing
    y = torch.compile(op, fullgraph=True, backend="aot_eager")(u, params, backend)
    torch.testing.assert_close(y, expected)
    for a, b in zip(gradients(y, u, params), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointing_gives_the_same_numbers(backend: str) -> None:
    u, params = inputs()
    expected = gradients(op(u, params, backend), u, params)
    y = checkpoint(op, u, params, backend, use_reentrant=False)
    for a, b in zip(gradients(y, u, params), expected, strict=True):
        assert torch.equal(a, b)


def test_empty_batch(backend: str) -> None:
    u, params = inputs(batch=0)
    y = op(u, params, backend)
    assert y.shape == (0, 7, 6)
    du, *rest = gradients(y, u, params)
    assert du.shape == u.shape
    assert all(g.abs().max() == 0 for g in rest)


def test_non_contiguous_input_and_gradient(backend: str) -> None:
    u, params = inputs(batch=4)
    base = u.detach().permute(2, 0, 1).contiguous()
    strided = base.permute(1, 2, 0).requires_grad_()
    assert not strided.is_contiguous()
    y = op(strided, params, backend)
    torch.testing.assert_close(y, op(u, params, backend))
    dy = torch.randn(6, 7, 4).permute(2, 1, 0)
    for a, b in zip(
        torch.autograd.grad(y, [strided, *params], dy),
        torch.autograd.grad(op(u, params, backend), [u, *params], dy.contiguous()),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_autocast_leaves_parameters_and_their_gradients_in_fp32(backend: str) -> None:
    u, params = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = op(u.bfloat16(), params, backend)
        exact = op(u.bfloat16().float(), params, backend)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())
    assert all(g.dtype == torch.float32 for g in gradients(y, u, params))


def test_saved_tensors_stay_within_the_budget(backend: str) -> None:
    batch, length, channels, states = 2, 256, 6, 4
    u, forward, backward = example(batch, length, channels, states, CPU, torch.float32, shared=False)
    params = [p.requires_grad_() for p in (*forward, *backward)]
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        op(u.requires_grad_(), params, backend)
    own = sum(p.nbytes for p in params)
    assert sum(saved.values()) <= u.nbytes + own + 24 * length * channels


def test_the_op_is_passed_by_only_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    u, _ = inputs()
    kernels = [torch.randn(3, 7) for _ in range(2)]
    seen: list[str] = []
    real = library.bidirectional_conv
    monkeypatch.setattr(library, "bidirectional_conv", lambda *args: (seen.append("op"), real(*args))[1])

    def through_the_op(call: Callable[[], Tensor]) -> Tensor:
        seen.clear()
        y = call()
        assert seen == ["op"]
        return y

    def conv() -> Tensor:
        return bidirectional_conv(u, *kernels, backend="torch")

    expected = through_the_op(conv)  # gradients
    with torch.no_grad():
        assert torch.equal(conv(), expected)
        assert seen == ["op"]  # nobody watched
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(through_the_op(conv), expected)
        with FlopCounterMode(display=False):
            through_the_op(conv)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert through_the_op(conv).shape == expected.shape
        empty = through_the_op(lambda: bidirectional_conv(u[:0], *kernels, backend="torch"))
        assert empty.shape == (0, 7, 6)


def test_meta_tensors_give_shapes_only() -> None:
    u, params = inputs()
    y = op(u.to("meta"), [p.to("meta") for p in params], "auto")
    assert y.shape == (2, 7, 6)
    assert y.is_meta


def test_shapes_that_do_not_fit_are_refused() -> None:
    u, params = inputs()
    with pytest.raises(ValueError, match=r"u: found shape .*allowed are \(B, L, 3\) and \(B, L, 6\)"):
        op(u[..., :4], params, "torch")
    with pytest.raises(ValueError, match="length: found 0"):
        ssm_kernel(SSMParams(*params[:6]), 0)
    with pytest.raises(ValueError, match="kernels: found"):
        bidirectional_conv(u, torch.randn(3, 7), torch.randn(3, 6))
