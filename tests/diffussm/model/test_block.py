import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from diffussm.model.block import Block, GroupedLinear
from diffussm.ops import bidirectional_ssm


def filled(width: int, hourglass: int) -> Block:
    """A block whose zero-initialised layers are random, so that everything shows in the output."""
    torch.manual_seed(0)
    block = Block(width, hourglass, 4, "torch")
    for p in block.parameters():
        if p.ndim < 3 or p is block.down.weight:
            torch.nn.init.normal_(p, std=0.3)
    return block


def literal(block: Block, x: Tensor, c: Tensor) -> Tensor:
    """The equations with loops over groups j and places k."""
    (batch, groups, width), ratio = x.shape, block.hourglass
    shift, scale, delta, gate = linear(c, block.adaln.weight, block.adaln.bias).split(width, dim=1)
    w_up = block.up.weight.reshape(ratio, 2 * width, width)
    b_up = block.up.bias.reshape(ratio, 2 * width)
    b_down = block.down.bias.reshape(ratio, 2 * width // ratio)
    h = layer_norm(x, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    u = torch.zeros(batch, groups * ratio, 2 * width)
    for j in range(groups):
        inner = gelu(linear(h[:, j], block.w0.weight, block.w0.bias))
        for k in range(ratio):
            u[:, j * ratio + k] = gelu(linear(inner, w_up[k], b_up[k]))
    y = bidirectional_ssm(u, *block.ssm._directions(), backend="reference")
    out = torch.zeros_like(x)
    for j in range(groups):
        parts = [gelu(linear(y[:, j * ratio + k], block.down.weight[k], b_down[k])) for k in range(ratio)]
        product = gelu(linear(torch.cat(parts, 1), block.w2.weight, block.w2.bias))
        product = product * gelu(linear(h[:, j], block.w1.weight, block.w1.bias)) * (1 + delta)
        out[:, j] = x[:, j] + gate * linear(product, block.w3.weight, block.w3.bias)
    return out


@pytest.mark.parametrize("hourglass", [1, 2, 4])
def test_block_is_its_equations(hourglass: int) -> None:
    block = filled(8, hourglass)
    x, c = torch.randn(2, 5, 8), torch.randn(2, 8)
    expected = literal(block, x, c)
    assert (expected - x).abs().max() > 0.1
    torch.testing.assert_close(block(x, c), expected, atol=1e-4, rtol=1e-4)


def test_fresh_block_is_the_identity() -> None:
    x = torch.randn(2, 5, 8)
    assert torch.equal(Block(8, 2, 4, "auto")(x, torch.randn(2, 8)), x)


def test_packed_layers_are_initialised_as_separate_ones() -> None:
    block = Block(32, 2, 4, "auto")
    for weight, fan_sum in (
        (block.w0.weight, 64),
        (block.up.weight, 64),
        (block.down.weight, 96),
        (block.w2.weight, 96),
    ):
        bound = math.sqrt(6 / fan_sum)
        assert 0.95 * bound < weight.abs().max() <= bound
    for name, p in block.named_parameters():
        if name.endswith("bias"):
            assert p.abs().max() == 0, name


def test_grouped_linear_joins_the_places_of_each_group() -> None:
    layer = GroupedLinear(2, 3, 4)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(5, 6, 3)
    out = layer(x)
    for j in range(3):
        for k in range(2):
            expected = linear(x[:, 2 * j + k], layer.weight[k], layer.bias[4 * k : 4 * k + 4])
            torch.testing.assert_close(out[:, j, 4 * k : 4 * k + 4], expected)


def test_autocast_runs_dense_layers_in_bf16_and_the_stream_in_fp32() -> None:
    block = filled(8, 2)
    x, c = torch.randn(2, 5, 8), torch.randn(2, 8)
    seen: list[torch.dtype] = []
    block.ssm.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x, c)
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert out.dtype == torch.float32
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.ssm.parameters())
    exact = block(x, c)
    assert (out - exact).norm() / (exact - x).norm() < 0.05
