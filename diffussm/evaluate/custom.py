"""Any torch module as a feature network, named by its import path."""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from diffussm.errors import ConfigError
from diffussm.evaluate.extractors import POOL, NetworkExtractor, named_after

_PROBE_PX = 32


class CustomExtractor(NetworkExtractor):
    """A torch module that turns uint8 (B, 3, H, W) into features (B, d), as torchmetrics takes one too.

    Args:
        spec: `module:attribute`; the attribute is a module, or a function without arguments that returns one. The
            package must be installed or on PYTHONPATH; importing it runs its code.
        device: torch device to run on.

    The name of the attribute names the metrics. The digest is over spec, parameters and buffers: a change of the code
    alone does not show in it.

    Raises:
        ConfigError: it cannot be imported, is no module, or does not give (B, d) features.
    """

    def __init__(self, spec: str, device: str | torch.device = "cpu") -> None:
        super().__init__(device)
        made = _import(spec)
        network = made if isinstance(made, nn.Module) else made() if callable(made) else made
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"evaluate.extractor={spec}: found {type(network).__name__}",
                "name a torch.nn.Module, or a function without arguments that returns one",
            )
        self.network = network.to(self.device).eval().requires_grad_(False)
        title = spec.partition(":")[2].rpartition(".")[2]
        self.name, self.metric_names = title.lower(), named_after(title)
        self.taps = {POOL: self._length(spec)}
        self.digest = _digest(spec, self.network)

    @override
    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {POOL: self.network(pixels)}  # (B, d)

    @torch.inference_mode()
    def _length(self, spec: str) -> int:
        probe = torch.zeros((2, 3, _PROBE_PX, _PROBE_PX), dtype=torch.uint8, device=self.device)
        found = self.network(probe)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(
                f"evaluate.extractor={spec}: gives {shape} for uint8 (2, 3, {_PROBE_PX}, {_PROBE_PX})",
                "return one feature vector for each picture: (B, d)",
            )
        return int(found.shape[1])


def _import(spec: str) -> Any:
    module, _, attribute = spec.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"evaluate.extractor={spec}: {error}", "install the package or put its folder on PYTHONPATH"
        ) from error
    return found


def _digest(spec: str, network: nn.Module) -> str:
    total = hashlib.sha256(spec.encode())
    for name, tensor in sorted(network.state_dict().items()):
        total.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(np.ascontiguousarray(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()).data)
    return total.hexdigest()[:16]
