import dataclasses
import shutil

import pytest
import torch
from torch import Tensor, nn

from diffussm.config.schema import ModelConfig, PosEmbed
from diffussm.errors import ConfigError
from diffussm.model import LatentShape, build_model

LATENT = LatentShape(channels=3, height=4, width=6, classes=5)


def network(latent: LatentShape = LATENT, checkpointing: bool = False, **fields: object) -> nn.Module:
    """A tiny network with all zero-initialised layers filled, so that everything shows in the output."""
    torch.manual_seed(0)
    cfg = dataclasses.replace(ModelConfig(preset="tiny", width=16, state=4), **fields)  # type: ignore[arg-type]
    model = build_model(cfg, latent, activation_checkpointing=checkpointing)
    for name, p in model.named_parameters():
        if "adaln" in name or "head" in name:
            nn.init.normal_(p, std=0.2)
    return model


def batch(latent: LatentShape = LATENT, n: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, latent.channels, latent.height, latent.width, generator=generator)
    return x, torch.randint(0, 1000, (n,), generator=generator), torch.randint(0, 6, (n,), generator=generator)


def test_a_fresh_network_predicts_zero() -> None:
    model = build_model(ModelConfig(preset="tiny"), LATENT)
    out = model(*batch())
    assert out.shape == (2, 6, 4, 6)
    assert out.dtype == torch.float32
    assert out.abs().max() == 0


def test_each_image_depends_on_its_own_input_timestep_and_label() -> None:
    model = network().eval()
    x, t, y = batch()
    out = model(x, t, y)
    for changed in (
        (x + torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), t, y),
        (x, t + torch.tensor([0, 7]), y),
        (x, t, (y + torch.tensor([0, 1])) % 6),
    ):
        other = model(*changed)
        torch.testing.assert_close(other[0], out[0])
        assert (other[1] - out[1]).abs().max() > 1e-3


def test_every_pixel_sees_every_pixel() -> None:
    model = network().eval()
    x, t, y = batch(n=1)
    out = model(x, t, y)
    for row, column in ((0, 0), (3, 5), (2, 1)):
        changed = x.clone()
        changed[..., row, column] += 1
        assert ((model(changed, t, y) - out).abs().amax(dim=(0, 1)) > 0).all()


def test_pixels_keep_their_places() -> None:
    """With blocks that do nothing, a pixel reaches exactly its own group of M neighbours."""
    model = network().eval()
    for block in model.blocks:
        nn.init.zeros_(block.adaln.weight)
        nn.init.zeros_(block.adaln.bias)
    x, t, y = batch(n=1)
    changed = x.clone()
    changed[..., 2, 3] += 1
    moved = (model(changed, t, y) - model(x, t, y)).abs().amax(dim=(0, 1)) > 0  # (H, W)
    assert moved.nonzero().tolist() == [[2, 2], [2, 3]]


def test_the_null_label_is_its_own_class() -> None:
    model = network().eval()
    x, t, _ = batch(n=1)
    assert model.null_label == 5
    outputs = [model(x, t, torch.tensor([label])) for label in range(6)]
    assert all((outputs[5] - o).abs().max() > 1e-3 for o in outputs[:5])
    with pytest.raises(IndexError):
        model(x, t, torch.tensor([6]))


@pytest.mark.parametrize("mode", ["checkpointing", "autocast"])
def test_checkpointing_changes_no_gradient(mode: str) -> None:
    plain, saving = network(), network(checkpointing=True)
    grads = []
    for model in (plain, saving):
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            model(*batch()).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a is not None
        assert torch.equal(a, b)


def test_positions_are_a_switch_and_no_part_of_the_state() -> None:
    plain, with_positions = network(), network(pos_embed=PosEmbed.sincos)
    assert with_positions.state_dict().keys() == plain.state_dict().keys()
    table = with_positions.positions  # (J, D)
    assert table.shape == (12, 16)
    assert len({tuple(row.tolist()) for row in table}) == 12
    torch.testing.assert_close(table[3, :8], table[5, :8])  # the second row begins at group 3
    torch.testing.assert_close(table[1, 8:], table[4, 8:])  # and repeats the columns
    assert (plain(*batch()) - with_positions(*batch())).abs().max() > 1e-3


def test_guided_sampling_reuses_kernels_over_steps_and_halves() -> None:
    model = network().eval()
    x, t, y = batch()
    expected = model(x, t, y).detach()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(x, t, y), expected)
    assert all(block.ssm._kept is not None for block in model.blocks)


def test_compiles_as_one_graph() -> None:
    model = network(depth=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*batch()), model(*batch()), atol=1e-5, rtol=1e-4)


def test_initialisation_follows_the_recipe() -> None:
    model = build_model(ModelConfig(preset="tiny", width=128), LatentShape(4, 4, 4, 999))
    assert model.label.table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.timestep.inner.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.stem.weight.abs().max() > 0
    assert model.head.linear.weight.abs().max() == 0


def test_a_seed_fixes_the_weights() -> None:
    first, second = network(), network()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("fields", "latent", "text"),
    [
        ({"hourglass": 5}, LATENT, "model.hourglass: found 5; it must divide the latent's 4 x 6 = 24"),
        ({"hourglass": 0}, LATENT, "model.hourglass: found 0"),
        ({"hourglass": 3}, LATENT, "it must divide twice the width, 32"),
        ({"state": 7}, LATENT, "model.state: found 7"),
        ({"width": 0}, LATENT, "model.width: found 0"),
        ({"depth": -1}, LATENT, "model.depth: found -1"),
        ({"width": 6, "pos_embed": PosEmbed.sincos}, LATENT, "multiple of 4, found 6"),
        ({}, dataclasses.replace(LATENT, classes=0), "latent: found"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields: dict[str, object], latent: LatentShape, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        network(latent, **fields)


def test_another_latent_is_refused() -> None:
    x, t, y = batch()
    with pytest.raises(ValueError, match="the network was built for"):
        network()(x[:, :1], t, y)
    with pytest.raises(ValueError, match="a length that"):
        network()(x[..., :3, :3], t, y)


@pytest.mark.parametrize("embedding", list(PosEmbed))
def test_one_network_takes_several_lengths(embedding: PosEmbed) -> None:
    """What it does to a size does not depend on the size that it was built for."""
    torch.manual_seed(0)
    x, t, y = batch()
    built = network(pos_embed=embedding)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    larger = torch.randn(len(x), x.shape[1], 2 * x.shape[2], 2 * x.shape[3])  # (B, C, 2H, 2W)
    wanted = LatentShape(x.shape[1], *larger.shape[2:], classes=built.latent.classes)
    other = network(wanted, pos_embed=embedding)
    other.load_state_dict(built.state_dict())
    torch.testing.assert_close(built(larger, t, y), other(larger, t, y))


@pytest.mark.parametrize("backend", ["reference", "torch", *(["cpu"] if shutil.which("g++") else [])])
def test_compiling_and_checkpointing_change_no_backends_numbers(backend: str) -> None:
    grads = {}
    for mode in ("plain", "checkpointing", "compiled"):
        name = "reference" if mode == "plain" else backend
        model = network(depth=1, backend=name, checkpointing=mode == "checkpointing")
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if mode == "compiled" else model
        run(*batch()).square().mean().backward()
        grads[mode] = [p.grad for p in model.parameters()]
    for mode in ("checkpointing", "compiled"):
        for found, expected in zip(grads[mode], grads["plain"], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)
