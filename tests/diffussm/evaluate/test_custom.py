from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffussm.errors import ConfigError
from diffussm.evaluate.extractors import open_extractor

HERE = "tests.diffussm.evaluate.test_custom"


class Channels(nn.Module):
    """Weighted mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8
        return x.float().mean((2, 3)) * self.weight


made = Channels()
flat = nn.Flatten(0)
number = 3


def heavier() -> nn.Module:
    network = Channels()
    network.weight.data[0] = 5.0
    return network


@pytest.mark.parametrize("attribute", ["made", "Channels", "heavier"])
def test_a_module_a_class_and_a_function_are_taken(attribute: str) -> None:
    found = open_extractor(f"{HERE}:{attribute}")
    images = np.random.default_rng(0).integers(0, 256, (11, 5, 6, 3), dtype=np.uint8)
    expected = images.astype(np.float32).mean((1, 2)) * (5 if attribute == "heavier" else 1, 2, 3)
    np.testing.assert_allclose(found.extract(images)["pool"], expected, rtol=1e-5)
    assert (found.name, found.taps) == (attribute.lower(), {"pool": 3})
    assert found.metric_names["frechet"] == f"FD-{attribute}"


def test_the_digest_follows_the_weights() -> None:
    one = open_extractor(f"{HERE}:heavier").digest
    assert one == open_extractor(f"{HERE}:heavier").digest
    made.weight.data[0] = 9.0
    changed = open_extractor(f"{HERE}:made").digest
    made.weight.data[0] = 1.0
    assert changed != open_extractor(f"{HERE}:made").digest


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("no.such.module:thing", "No module named"),
        (f"{HERE}:nothing", "nothing"),
        (f"{HERE}:number", "found int"),
        (f"{HERE}:flat", "one feature vector"),
    ],
)
def test_what_is_no_feature_network_is_refused(spec: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        open_extractor(spec)
