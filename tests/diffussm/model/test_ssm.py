import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffussm.model.ssm import BiSSM, _Kept, drop_kernels, fixed_parameters
from diffussm.ops import library

WIDTH, STATE, LENGTH = 3, 4, 9


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the kernels made so far, one entry for each direction."""
    lengths: list[int] = []
    real = library.ssm_kernel

    def counting(*args: object) -> Tensor:
        lengths.append(args[6])  # type: ignore[arg-type]
        return real(*args)

    monkeypatch.setattr(library, "ssm_kernel", counting)
    return lengths


@pytest.fixture
def layer() -> BiSSM:
    torch.manual_seed(0)
    return BiSSM(WIDTH, STATE).eval()


def uncached(layer: BiSSM, u: Tensor) -> Tensor:
    """What the layer gives without any kept kernels."""
    with torch.enable_grad():
        return copy.deepcopy(layer)(u).detach()


def test_initial_parameters_are_s4d_lin() -> None:
    layer = BiSSM(500, 64)
    a = torch.complex(-layer.log_a_real.exp(), layer.a_imag)
    torch.testing.assert_close(a[0, 0], torch.complex(torch.full((32,), -0.5), math.pi * torch.arange(32.0)))
    assert torch.equal(layer.b, torch.tensor([1.0, 0.0]).expand(2, 500, 32, 2))
    dt = layer.log_dt.exp()
    assert 1e-3 <= dt.min() < 1.2e-3
    assert 0.8e-1 < dt.max() <= 1e-1
    assert layer.log_dt.mean().item() == pytest.approx(math.log(1e-2), abs=0.15)
    assert layer.c.square().sum(-1).mean().item() == pytest.approx(1.0, abs=0.03)
    assert not torch.equal(layer.c[0], layer.c[1])


def test_directions_read_their_own_half_and_time_runs_both_ways(layer: BiSSM) -> None:
    u = torch.randn(1, LENGTH, 2 * WIDTH)
    changed = u.clone()
    changed[:, 4, 0] += 1  # a forward channel
    changed[:, 4, WIDTH + 1] += 1  # a backward channel
    moved = (layer(changed) - layer(u)).abs()[0] > 1e-6  # (L, 2D)
    expected = torch.zeros_like(moved)
    expected[4:, 0] = True
    expected[:5, WIDTH + 1] = True
    assert torch.equal(moved, expected)


def test_the_backward_direction_is_the_forward_one_on_the_reversed_sequence(layer: BiSSM) -> None:
    with torch.no_grad():
        for p in layer.parameters():
            p[1] = p[0]
    u = torch.randn(2, LENGTH, WIDTH)
    y_f, y_b = layer(torch.cat((u, u.flip(1)), dim=2)).chunk(2, dim=2)
    torch.testing.assert_close(y_b.flip(1), y_f)


def test_optimiser_marks_survive_moves() -> None:
    layer = BiSSM(WIDTH, STATE)
    for moved in (layer, layer.to("meta"), layer.to_empty(device="cpu")):
        assert all(p._optim == {"weight_decay": 0.0, "fp32": True} for p in moved.parameters())  # type: ignore[attr-defined]


def test_parameters_stay_fp32_under_every_conversion(layer: BiSSM) -> None:
    before = layer.log_dt.detach().clone()
    for convert in (nn.Module.bfloat16, nn.Module.half, lambda m: m.to("cpu", torch.bfloat16)):
        convert(layer)
        assert all(p.dtype == torch.float32 for p in layer.parameters())
    assert torch.equal(layer.log_dt, before)
    assert layer.double().log_dt.dtype == torch.float64


def test_kernels_are_made_once_while_sampling(layer: BiSSM, made: list[int]) -> None:
    u = torch.randn(2, LENGTH, 2 * WIDTH)
    with torch.no_grad():
        first = layer(u)
        for _ in range(3):
            assert torch.equal(layer(u), first)
    assert made == [LENGTH, LENGTH]
    torch.testing.assert_close(first, uncached(layer, u))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_kernels_follow_the_length(mode: Callable, layer: BiSSM, made: list[int]) -> None:
    with mode():
        for length in (4, 4, 6, 6, 4):
            assert layer(torch.randn(1, length, 2 * WIDTH)).shape == (1, length, 2 * WIDTH)
    assert made == [4, 4, 6, 6, 4, 4]


def write_in_place(layer: BiSSM) -> None:
    layer.c.mul_(2)


def write_one_element(layer: BiSSM) -> None:
    layer.skip[1, 0] += 1


def write_by_foreach(layer: BiSSM) -> None:
    torch._foreach_mul_(list(layer.parameters()), 1.5)


def write_in_inference_mode(layer: BiSSM) -> None:
    with torch.inference_mode():
        layer.c.mul_(2)


def replace_parameter(layer: BiSSM) -> None:
    layer.b = nn.Parameter(layer.b * 2)


def replace_data(layer: BiSSM) -> None:
    layer.log_dt.data = layer.log_dt.data + 1


def load(layer: BiSSM) -> None:
    nn.ModuleDict({"ssm": layer}).load_state_dict({f"ssm.{k}": v * 1.5 for k, v in layer.state_dict().items()})


def load_by_assignment(layer: BiSSM) -> None:
    layer.load_state_dict({k: v * 1.5 for k, v in layer.state_dict().items()}, assign=True)


def step_of_an_optimiser(layer: BiSSM) -> None:
    with torch.enable_grad():
        layer(torch.randn(1, 4, 2 * WIDTH)).square().sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.1).step()


def write_unseen_while_training(layer: BiSSM) -> None:
    layer.train()
    layer.c.data.mul_(2)
    layer.eval()


def write_unseen_after_a_pass_with_gradients(layer: BiSSM) -> None:
    with torch.enable_grad():
        layer(torch.randn(1, 4, 2 * WIDTH))
    layer.c.data.mul_(2)


def write_unseen_and_say_so(layer: BiSSM) -> None:
    layer.c.data.mul_(2)
    drop_kernels(nn.Sequential(layer))


def move_and_come_back(layer: BiSSM) -> None:
    layer.to(torch.float64)
    layer.c.data.mul_(2)
    layer.to(torch.float32)


def assert_no_stale_kernel_after(change: Callable[[BiSSM], None], layer: BiSSM) -> None:
    u = torch.randn(2, LENGTH, 2 * WIDTH)
    with torch.no_grad():
        before = layer(u)
        change(layer)
        after = layer(u)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, uncached(layer, u))


@pytest.mark.parametrize(
    "change",
    [
        write_in_place,
        write_one_element,
        write_by_foreach,
        write_in_inference_mode,
        replace_parameter,
        replace_data,
        load,
        load_by_assignment,
        step_of_an_optimiser,
        write_unseen_while_training,
        write_unseen_after_a_pass_with_gradients,
        write_unseen_and_say_so,
        move_and_come_back,
    ],
)
def test_no_stale_kernel_after(change: Callable[[BiSSM], None], layer: BiSSM) -> None:
    assert_no_stale_kernel_after(change, layer)


@pytest.mark.parametrize(
    "change",
    [write_in_place, write_one_element, write_by_foreach, write_in_inference_mode, replace_parameter, replace_data],
)
def test_a_layer_that_keeps_stale_kernels_is_rejected(
    change: Callable[[BiSSM], None], layer: BiSSM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant of the check above: kernels that are kept whatever becomes of the parameters."""
    monkeypatch.setattr(_Kept, "fits", lambda *_: True)
    with pytest.raises(AssertionError):
        assert_no_stale_kernel_after(change, layer)


def test_memory_of_the_kept_kernels_sources_is_not_handed_out_again(layer: BiSSM) -> None:
    """A new tensor at an old address with an old version count must not pass for the old parameter."""
    u = torch.randn(1, LENGTH, 2 * WIDTH)
    with torch.no_grad():
        layer(u)
        old = layer.c.data_ptr()
        for _ in range(50):
            layer.c.data = torch.randn_like(layer.c)
            assert layer.c.data_ptr() != old
        torch.testing.assert_close(layer(u), uncached(layer, u))


def test_parameters_made_in_inference_mode_are_never_kept(made: list[int]) -> None:
    with torch.inference_mode():
        layer = BiSSM(WIDTH, STATE).eval()
        u = torch.randn(1, LENGTH, 2 * WIDTH)
        before = layer(u)
        layer.c.mul_(2)
        assert not torch.allclose(layer(u), before)
    assert len(made) == 4


def test_nothing_is_kept_in_training_or_with_gradients(layer: BiSSM) -> None:
    u = torch.randn(1, LENGTH, 2 * WIDTH)
    with torch.no_grad():
        layer(u)
        layer.train()(u)
    assert layer._kept is None
    layer.eval()(u).sum().backward()
    assert layer._kept is None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_kernels_are_made_once_for_all_micro_batches_of_a_step(layer: BiSSM, made: list[int]) -> None:
    layer.train()
    micros = [torch.randn(1, length, 2 * WIDTH) for length in (4, 6, 4)]

    def accumulated() -> list[Tensor]:
        layer.zero_grad()
        for u in micros:
            checkpoint(layer, u, use_reentrant=False).square().sum().backward()
        return [p.grad.clone() for p in layer.parameters()]  # type: ignore[union-attr]

    expected = accumulated()
    assert len(made) == 12  # each pass and each recomputation, both directions
    made.clear()
    with fixed_parameters(nn.Sequential(layer)):
        for found, right in zip(accumulated(), expected, strict=True):
            assert torch.equal(found, right)
    assert made == [4, 4, 6, 6]
    assert layer._fixed is None
    with torch.no_grad():
        layer.c.mul_(2)
    with fixed_parameters(layer):  # the next step's parameters: nothing is left of the old kernels
        torch.testing.assert_close(layer(micros[0]), uncached(layer, micros[0]))
    with pytest.raises(RuntimeError, match="stop"), fixed_parameters(layer):
        raise RuntimeError("stop")
    assert layer._fixed is None


def test_copies_do_not_share_kernels(layer: BiSSM) -> None:
    u = torch.randn(1, LENGTH, 2 * WIDTH)
    with torch.no_grad():
        layer(u)
        assert copy.deepcopy(layer)._kept is None
        assert pickle.loads(pickle.dumps(layer))._kept is None  # noqa: S301
        assert layer._kept is not None


def test_compiles_without_a_break_in_evaluation_and_training(layer: BiSSM) -> None:
    u = torch.randn(1, LENGTH, 2 * WIDTH)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(u), layer(u))
    torch.testing.assert_close(compiled(u), layer(u))
