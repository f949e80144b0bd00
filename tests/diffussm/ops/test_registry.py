import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffussm.errors import ConfigError, MissingError
from diffussm.ops import parity, registry
from diffussm.ops.params import SSMParams
from diffussm.ops.torch import TorchBackend
from tests.diffussm.ops import checks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    before = dict(registry._registered), dict(registry._PREFERENCE)
    registry.forget()
    yield
    for now, then in zip((registry._registered, registry._PREFERENCE), before, strict=True):
        now.clear()
        now.update(then)  # type: ignore[arg-type]
    registry.forget()


class Counting(TorchBackend):
    """Works; counts how often its kernels are made."""

    name = "counting"

    def __init__(self) -> None:
        self.calls = 0

    def kernel(self, params: SSMParams, length: int) -> Tensor:
        self.calls += 1
        return super().kernel(params, length)


class ZeroOutput(TorchBackend):
    def conv(self, u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
        return torch.zeros_like(super().conv(u, k_f, k_b))


class ZeroInputGradient(TorchBackend):
    def conv_backward(self, dy: Tensor, u: Tensor, k_f: Tensor, k_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        du, dk_f, dk_b = super().conv_backward(dy, u, k_f, k_b)
        return torch.zeros_like(du), dk_f, dk_b


class SwappedDirections(TorchBackend):
    def conv(self, u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
        return super().conv(u, k_f, k_b).roll(k_f.shape[0], 2)


class NeverFlips(TorchBackend):
    """Runs the second direction forward too."""

    def conv(self, u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
        y, flipped = super().conv(u, k_f, k_b), super().conv(u.flip(1), k_f, k_b).flip(1)
        return torch.cat((y[..., : k_f.shape[0]], flipped[..., k_f.shape[0] :]), dim=2)


class ShiftedKernel(TorchBackend):
    def kernel(self, params: SSMParams, length: int) -> Tensor:
        return super().kernel(params, length).roll(1, 1)


class MissingConjugate(TorchBackend):
    def kernel_backward(self, dk: Tensor, params: SSMParams) -> SSMParams:
        grads = super().kernel_backward(dk, params)
        return grads._replace(c=grads.c * torch.tensor([1.0, -1.0], dtype=grads.c.dtype))


class CircularConvolution(TorchBackend):
    def conv(self, u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
        doubled = super().conv(torch.cat((u, u), 1), *(torch.cat((k, k * 0), 1) for k in (k_f, k_b)))
        return doubled[:, u.shape[1] :].contiguous()


class NotANumber(TorchBackend):
    def conv(self, u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
        return super().conv(u, k_f, k_b) * float("nan")


class Raises(TorchBackend):
    def conv(self, u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
        raise RuntimeError("no such instruction")


class Unavailable(TorchBackend):
    def available(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return "no compiler was found"


MUTANTS = [
    ZeroOutput,
    ZeroInputGradient,
    SwappedDirections,
    NeverFlips,
    ShiftedKernel,
    MissingConjugate,
    CircularConvolution,
    NotANumber,
    Raises,
]


def install(cls: type[TorchBackend]) -> str:
    backend = cls()
    backend.name = cls.__name__
    registry.register(backend, devices=("cpu",))
    return backend.name


@pytest.mark.parametrize("mutant", MUTANTS)
def test_parity_check_rejects(mutant: type[TorchBackend]) -> None:
    name = install(mutant)
    found = registry.verdict(name, CPU, torch.float32)
    assert not found.usable
    assert "parity check failed" in found.reason or "no such instruction" in found.reason


@pytest.mark.parametrize("mutant", MUTANTS)
def test_suites_own_checks_reject(mutant: type[TorchBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "check", lambda *_, **__: None)  # let it through to the checks
    name = install(mutant)
    with pytest.raises((AssertionError, RuntimeError)):
        checks.accuracy(name, 2, 37, 5, 4, False, torch.float32)


@pytest.mark.parametrize("mutant", [*MUTANTS, Unavailable])
def test_auto_passes_over_what_does_not_work_and_says_so_once(
    mutant: type[TorchBackend], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry._PREFERENCE, "cpu", ("torch",))  # whether or not this machine has a compiler
    name = install(mutant)
    with caplog.at_level(logging.INFO, logger="diffussm.ops"):
        for _ in range(3):
            assert registry.resolve("auto", CPU, torch.float32).name == "torch"
    lines = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert [level for level, _ in lines] == ["WARNING", "INFO"]
    assert name in lines[0][1]
    assert "operator backend torch on cpu with torch.float32: parity check passed" in lines[1][1]


@pytest.mark.parametrize("mutant", [ZeroOutput, Unavailable])
def test_a_named_backend_is_refused_with_reason_and_remedy(mutant: type[TorchBackend]) -> None:
    name = install(mutant)
    with pytest.raises(MissingError, match=f"{name}.*cannot be used on cpu") as refused:
        registry.resolve(name, CPU, torch.float32)
    assert ("no compiler was found" in refused.value.message) == (mutant is Unavailable)
    assert "model.backend=auto" in refused.value.remedy


def test_a_named_backend_that_works_is_used() -> None:
    assert registry.resolve("reference", CPU, torch.float32).name == "reference"


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="found 'torhc'; allowed are auto, reference, torch") as refused:
        registry.resolve("torhc", CPU, torch.float32)
    assert "'torch'" in refused.value.remedy


def test_nothing_works() -> None:
    registry._PREFERENCE["cpu"] = ()
    name = install(ZeroOutput)
    with pytest.raises(MissingError, match=name):
        registry.resolve("auto", CPU, torch.float32)


def test_the_check_runs_once_for_each_device_and_dtype_and_leaves_random_numbers_alone() -> None:
    backend = Counting()
    registry.register(backend, devices=("cpu",))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    registry.resolve("auto", CPU, torch.float32)
    calls = backend.calls
    registry.resolve("auto", CPU, torch.float32)
    registry.resolve("counting", CPU, torch.float32)
    assert backend.calls == calls > 0
    registry.resolve("auto", CPU, torch.bfloat16)
    assert backend.calls == 2 * calls
    assert torch.equal(torch.rand(4), expected)


def test_the_check_is_invisible_to_counters_and_possible_in_inference_mode() -> None:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        assert registry.resolve("auto", CPU, torch.float32).name in registry.names()
    assert counter.get_total_flops() == 0


def test_survey_names_every_backend() -> None:
    install(Unavailable)
    verdicts = {v.name: v for v in registry.survey(CPU, torch.float32)}
    assert list(verdicts) == registry.names()
    assert verdicts["torch"].usable
    assert verdicts["Unavailable"].reason == "no compiler was found"


def test_a_dtype_without_tolerance_is_refused() -> None:
    with pytest.raises(MissingError, match=r"torch\.int32"):
        registry.resolve("torch", CPU, torch.int32)
