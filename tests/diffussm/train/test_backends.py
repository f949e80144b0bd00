"""The network's steps are the same with every backend of the operator, under every ZeRO stage, while accumulating."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.distributed as dist
from torch import nn

from diffussm.config.schema import ModelConfig, Precision, TrainConfig
from diffussm.model import LatentShape, build_model
from diffussm.ops import library
from diffussm.train.engine import Engine
from diffussm.train.optim import adamw, parameter_groups
from diffussm.train.world import current

BATCH, STEPS, DEPTH = 4, 2, 2
BACKENDS = ["reference", "torch", *(["cpu"] if shutil.which("g++") else [])]


def network(backend: str, *, checkpointing: bool = False) -> nn.Module:
    torch.manual_seed(0)
    cfg = ModelConfig(preset="tiny", depth=DEPTH, width=16, state=4, backend=backend)
    latent = LatentShape(channels=2, height=4, width=4, classes=3)
    model = build_model(cfg, latent, activation_checkpointing=checkpointing)
    with torch.no_grad():  # a fresh network answers zero whatever the operator does
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def loss_of(model: nn.Module, step: int, part: slice) -> torch.Tensor:
    x = torch.randn(BATCH, 2, 4, 4, generator=torch.Generator().manual_seed(step))
    t, y = torch.arange(BATCH) * 100, torch.arange(BATCH) % 3
    return model(x[part], t[part], y[part]).pow(2).mean()


def config(stage: int) -> TrainConfig:
    return TrainConfig(images=1000, global_batch=BATCH, lr=1e-3, zero_stage=stage, precision=Precision.fp32)


@pytest.mark.world_size(2)
def test_every_backend_takes_the_same_steps_under_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = network("reference")
    optimizer = adamw(parameter_groups(plain.parameters(), config(0).weight_decay), config(0))
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(plain, step, slice(None)).backward()
        optimizer.step()
    expected = {name: optimizer.state[p]["exp_avg"].flatten() for name, p in plain.named_parameters()}
    made: list[int] = []
    real = library.ssm_kernel
    monkeypatch.setattr(library, "ssm_kernel", lambda *args: (made.append(1), real(*args))[1])
    rank = dist.get_rank()
    parts = [slice(2 * rank, 2 * rank + 1), slice(2 * rank + 1, 2 * rank + 2)]  # micro batches of one image
    for backend in BACKENDS:
        for stage, checkpointing in ((0, False), (1, True), (2, False), (3, True)):
            model = network(backend, checkpointing=checkpointing)
            engine = Engine(model, config(stage), 2, current(torch.device("cpu")))
            made.clear()
            for step in range(STEPS):
                engine.step([lambda m, p=p, s=step: loss_of(m, s, p) for p in parts], lr=1e-3)
            # Once for each layer, direction and step: neither micro batches nor recomputation make them again.
            assert len(made) == 2 * DEPTH * STEPS
            for piece in engine.slices():
                # The moments are linear in the gradients; the step itself divides by their size, roundings included.
                right = expected[piece.name][piece.start : piece.start + piece.numel]
                error = (piece.tensors["exp_avg"].flatten() - right).norm()
                assert error <= 1e-2 * right.norm() + 1e-7, (backend, stage, piece.name, error, right.norm())
