"""One DiffuSSM block: gated bidirectional state-space layer on an hourglass (arXiv 2311.18257, section 4).

With I (B, J, D), J = L / M, position l = j M + k, s = GELU and modulations (shift, scale, delta, gate) of c:

    h    = LayerNorm(I) * (1 + scale) + shift
    U_l  = s(W_up[k] s(W0 h_j))                    (B, L, 2D): D channels for each direction
    Y    = BiSSM(U)                                (B, L, 2D)
    I'_j = concat_k s(W_down[k] Y_l)               (B, J, 2D): each W_down[k] maps 2D -> 2D/M
    O    = W3(s(W2 I') * s(W1 h) * (1 + delta))    (B, J, D)
    out  = I + gate * O

Of the readings that the paper allows this is the one with its stated 9 D^2 + 2 M D^2 weights a block; four
modulations give its 673M parameters. The dense layers hold 13 D^2 weights at M = 2 and run at length J, save W_up and
W_down, which cost as much as layers at length J of 2 M D^2 weights each way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from diffussm.model.ssm import BiSSM

LAYER_NORM_EPS = 1e-6


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights over the last axis of x (B, J, D), then scale and shift (B, D) around identity."""
    normed = layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)  # (B, J, D)
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None])


class GroupedLinear(nn.Module):
    """One linear layer for each place k in a group: (B, J M, in) -> (B, J, M out), the groups' outputs joined."""

    def __init__(self, groups: int, features_in: int, features_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, features_out, features_in))
        self.bias = nn.Parameter(torch.zeros(groups * features_out))
        xavier_uniform_packed(self.weight, features_in, features_out)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, J M, in) -> (B, J, M out)."""
        groups, _, features_in = self.weight.shape
        by_place = x.reshape(-1, groups, features_in).transpose(0, 1)  # (M, B J, in), a view
        out = torch.bmm(by_place, self.weight.transpose(1, 2))  # (M, B J, out)
        joined = out.transpose(0, 1).reshape(x.shape[0], x.shape[1] // groups, -1)  # (B, J, M out)
        return joined + self.bias


class Block(nn.Module):
    """One block; `hourglass` is M, `state` is N."""

    def __init__(self, width: int, hourglass: int, state: int, backend: str) -> None:
        super().__init__()
        self.hourglass = hourglass
        self.w0 = nn.Linear(width, width)
        # All W_up[k] of both directions in one product: row block k of the weight is W_up[k], so a plain reshape of
        # the output puts sub-position k of group j at l = j M + k.
        self.up = nn.Linear(width, hourglass * 2 * width)
        self.ssm = BiSSM(width, state, backend)
        self.down = GroupedLinear(hourglass, 2 * width, 2 * width // hourglass)
        self.w1 = nn.Linear(width, width)
        self.w2 = nn.Linear(2 * width, width)
        self.w3 = nn.Linear(width, width)
        self.adaln = nn.Linear(width, 4 * width)
        for layer in (self.w0, self.w1, self.w2, self.w3):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        xavier_uniform_packed(self.up.weight, width, width)  # 2 M layers D -> D
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.adaln.weight)
        nn.init.zeros_(self.adaln.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, J, D) residual stream, c (B, D) activated condition -> (B, J, D)."""
        shift, scale, delta, gate = self.adaln(c).chunk(4, dim=1)  # (B, D) each
        h = modulate(x, shift, scale)  # (B, J, D)
        u = gelu(self.up(gelu(self.w0(h))))  # (B, J, M 2D)
        u = u.reshape(x.shape[0], x.shape[1] * self.hourglass, -1)  # (B, L, 2D)
        y = self.ssm(u)  # (B, L, 2D)
        mixed = gelu(self.down(y))  # (B, J, 2D)
        product = gelu(self.w2(mixed)) * gelu(self.w1(h))  # (B, J, D)
        out = self.w3(product * (1 + delta[:, None]))  # (B, J, D)
        return torch.addcmul(x, gate[:, None].to(x.dtype), out.to(x.dtype))


def xavier_uniform_packed(weight: Tensor, features_in: int, features_out: int) -> None:
    """Fill `weight`, which packs several linear layers of features_in -> features_out, as if each stood alone."""
    bound = math.sqrt(6 / (features_in + features_out))
    nn.init.uniform_(weight, -bound, bound)
