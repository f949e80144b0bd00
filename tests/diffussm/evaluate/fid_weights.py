"""A weights file in the layout of the FID Inception's, with random numbers: for parity of networks, not of scores."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from diffussm.evaluate.inception import Network, _Unit


def random_weights(path: Path, seed: int = 0, logits: float = 0.05) -> str:
    """Write the file; returns its SHA-256. Batch norms are far from the identity, so that each term counts.

    `logits` is the deviation of the last layer's weights: the larger, the surer the network is of its
    classes, whatever the picture.
    """
    source = torch.Generator().manual_seed(seed)
    state = {}
    network = Network()
    for name, unit in network.named_modules():
        if isinstance(unit, _Unit):
            weight = torch.empty_like(unit.conv.weight)
            fan_in = weight[0].numel()
            state[f"{name}.conv.weight"] = weight.normal_(0, (2 / fan_in) ** 0.5, generator=source)
            size = len(weight)
            state[f"{name}.bn.weight"] = torch.empty(size).uniform_(0.7, 1.4, generator=source)
            state[f"{name}.bn.bias"] = torch.empty(size).normal_(0, 0.2, generator=source)
            state[f"{name}.bn.running_mean"] = torch.empty(size).normal_(0, 0.2, generator=source)
            state[f"{name}.bn.running_var"] = torch.empty(size).uniform_(0.7, 1.4, generator=source)
    state["fc.weight"] = torch.empty_like(network.fc.weight).normal_(0, logits, generator=source)
    state["fc.bias"] = torch.empty_like(network.fc.bias).normal_(0, 1.0, generator=source)
    torch.save(state, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()
