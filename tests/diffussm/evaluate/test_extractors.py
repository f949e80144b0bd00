from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional
from typing_extensions import override

from diffussm.errors import ConfigError
from diffussm.evaluate.extractors import Extractor, Features, named_after, open_extractor


class Colours(Extractor):
    """Mean colour of a picture: three features."""

    name, metric_names, taps, digest = "colours", named_after("Colours"), {"pool": 3}, "c0ffee"

    def __init__(self) -> None:
        self.seen = 0

    @override
    def _extract(self, images: np.ndarray) -> Features:
        self.seen += len(images)
        return {"pool": images.mean((1, 2)).astype(np.float32)}


def pictures(count: int, side: int) -> np.ndarray:
    # Smooth colours with some noise: features of pure noise are nearly constant.
    rng = np.random.default_rng(side)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 4, 4)))
    smooth = functional.interpolate(coarse, (side, side), mode="bicubic").numpy() + rng.normal(0, 8, (side, side))
    return smooth.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def test_other_types_and_shapes_are_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        Colours().extract(np.zeros((1, 8, 8, 3)))
    for shape in [(8, 8, 3), (1, 3, 8, 8), (1, 0, 8, 3)]:
        with pytest.raises(ValueError, match="shape"):
            Colours().extract(np.zeros(shape, np.uint8))


def test_no_pictures_have_no_features() -> None:
    assert Colours().extract(np.zeros((0, 4, 4, 3), np.uint8))["pool"].shape == (0, 3)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"evaluate.extractor: found 'vgg'; allowed: efflite0, inception"):
        open_extractor("vgg")


def test_only_adms_network_gives_fid() -> None:
    assert named_after("X") == {
        "frechet": "FD-X", "kernel": "KD-X", "precision": "precision-X", "recall": "recall-X",
    }  # fmt: skip
