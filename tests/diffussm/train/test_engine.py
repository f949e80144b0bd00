"""The engine against a plain loop, and its slices against what they must cover."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from diffussm.config.schema import Precision, TrainConfig
from diffussm.train.engine import Engine
from diffussm.train.optim import adamw, parameter_groups
from diffussm.train.world import current

BATCH, STEPS = 12, 4


class Net(nn.Module):
    """Sizes that no world size divides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(7, 5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.scale._optim = {"weight_decay": 0.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.b(torch.tanh(self.a(x)))


def config(stage: int, **changes: object) -> TrainConfig:
    base = {"images": 1000, "global_batch": BATCH, "lr": 1e-2, "zero_stage": stage, "precision": Precision.fp32}
    return TrainConfig(**(base | {"weight_decay": 0.1} | changes))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def data(step: int) -> torch.Tensor:
    return torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(step))


def mine(step: int, accumulation: int) -> list[torch.Tensor]:
    share = data(step).chunk(dist.get_world_size())[dist.get_rank()]
    return list(share.chunk(accumulation))


def losses(step: int, accumulation: int) -> list:
    return [lambda model, x=x: model(x).pow(2).mean() for x in mine(step, accumulation)]


def plain_steps(steps: int) -> Net:
    model, cfg = net(), config(0)
    optimizer = adamw(parameter_groups(model.parameters(), cfg.weight_decay), cfg)
    for step in range(steps):
        optimizer.zero_grad()
        model(data(step)).pow(2).mean().backward()
        optimizer.step()
    return model


def whole(engine: Engine, kind: str) -> dict[str, torch.Tensor]:
    """The full tensors, put together from all ranks' slices; every element must come exactly once."""
    full = {name: torch.zeros(shape).flatten() for name, shape in engine.shapes.items()}
    seen = {name: torch.zeros(shape).flatten() for name, shape in engine.shapes.items()}
    for piece in engine.slices():
        full[piece.name][piece.start : piece.start + piece.numel] += piece.tensors[kind]
        seen[piece.name][piece.start : piece.start + piece.numel] += 1
    for name in full:
        dist.all_reduce(full[name])
        dist.all_reduce(seen[name])
        assert torch.equal(seen[name], torch.ones_like(seen[name])), f"{name} is covered {seen[name]} times"
    return {name: tensor.view(engine.shapes[name]) for name, tensor in full.items()}


def check_stage(stage: int, accumulation: int) -> None:
    engine = Engine(net(), config(stage), accumulation, current(torch.device("cpu")))
    for step in range(STEPS):
        result = engine.step(losses(step, accumulation), lr=1e-2)
        assert not result.skipped
        assert result.grad_norm > 0
    expected = dict(plain_steps(STEPS).named_parameters())
    for name, tensor in whole(engine, "master").items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-5, atol=1e-6)
    assert any(tensor.abs().max() > 0 for tensor in whole(engine, "exp_avg").values())


def check_restore(stage: int) -> None:
    """State written into a fresh engine's slices makes it take the very steps the old one would."""
    world = current(torch.device("cpu"))
    first = Engine(net(), config(stage), 1, world)
    for step in range(2):
        first.step(losses(step, 1), lr=1e-2)
    kept = {kind: whole(first, kind) for kind in ("master", "exp_avg", "exp_avg_sq")}
    torch.manual_seed(1)
    second = Engine(Net(), config(stage), 1, world)
    for piece in second.slices(held=True):
        for kind, target in piece.tensors.items():
            target.copy_(kept[kind][piece.name].flatten()[piece.start : piece.start + piece.numel])
    second.restored(adam_steps=2)
    for step in range(2, STEPS):
        a, b = first.step(losses(step, 1), lr=1e-2), second.step(losses(step, 1), lr=1e-2)
        assert torch.equal(a.loss, b.loss)
        assert a.grad_norm == b.grad_norm
    after_first, after_second = whole(first, "master"), whole(second, "master")
    for name, tensor in after_first.items():
        assert torch.equal(tensor, after_second[name]), name


def check_skip(stage: int) -> None:
    """A gradient that is not finite on one rank is skipped on all and changes nothing; the next step is taken."""
    engine = Engine(net(), config(stage), 1, current(torch.device("cpu")))
    engine.step(losses(0, 1), lr=1e-2)
    before = {kind: whole(engine, kind) for kind in ("master", "exp_avg")}
    poison = float("nan") if dist.get_rank() == dist.get_world_size() - 1 else 1.0
    result = engine.step([lambda model: model(mine(1, 1)[0]).pow(2).mean() * poison], lr=1e-2)
    assert result.skipped
    for kind, tensors in before.items():
        after = whole(engine, kind)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, after[name]), (kind, name)
    assert not engine.step(losses(2, 1), lr=1e-2).skipped
    assert not torch.equal(whole(engine, "master")["a.weight"], before["master"]["a.weight"])


@pytest.mark.world_size(1)
def test_one_rank() -> None:
    for stage in (0, 1, 2, 3):
        check_stage(stage, accumulation=2)
        check_restore(stage)
        check_skip(stage)


@pytest.mark.world_size(2)
def test_two_ranks_equal_one_process() -> None:
    for stage in (0, 1, 2, 3):
        check_stage(stage, accumulation=1)
        check_stage(stage, accumulation=3)


@pytest.mark.world_size(3)
def test_slices_of_uneven_shares_restore_and_skip() -> None:
    for stage in (0, 1, 2, 3):
        check_restore(stage)
        check_skip(stage)


@pytest.mark.world_size(1)
def test_clipping_is_torchs_under_every_stage() -> None:
    model, cfg = net(), config(0)
    optimizer = adamw(parameter_groups(model.parameters(), cfg.weight_decay), cfg)
    for step in range(2):
        optimizer.zero_grad()
        (100 * model(data(step)).pow(2).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    expected = dict(model.named_parameters())
    for stage in (0, 1, 2, 3):
        engine = Engine(net(), config(stage, grad_clip=0.5), 1, current(torch.device("cpu")))
        for step in range(2):
            result = engine.step([lambda net, step=step: 100 * net(mine(step, 1)[0]).pow(2).mean()], lr=1e-2)
            assert result.grad_norm > 0.5  # the norm before clipping
        for name, tensor in whole(engine, "master").items():
            torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.world_size(1)
def test_bf16_keeps_every_parameter_fp32() -> None:
    engine = Engine(net(), config(1, precision=Precision.bf16), 1, current(torch.device("cpu")))
    seen = []

    def loss(model: nn.Module) -> torch.Tensor:
        out = model(data(0))
        seen.append(out.dtype)
        return out.float().pow(2).mean()

    engine.step([loss], lr=1e-2)
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}
    hidden = []
    engine.module.a.register_forward_hook(lambda *args: hidden.append(args[2].dtype))
    engine.step([loss], lr=1e-2)
    assert hidden == [torch.bfloat16]
