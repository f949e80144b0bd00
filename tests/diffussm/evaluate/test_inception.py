"""Our port of the FID network beside torch-fidelity's, on one file of random weights, spatial tap included."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffussm.errors import MissingError
from diffussm.evaluate.extractors import Features, open_extractor
from diffussm.evaluate.inception import _PREPROCESSING, Inception, resize_like_tensorflow
from tests.diffussm.evaluate.fid_weights import random_weights
from tests.diffussm.evaluate.test_extractors import pictures

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    return path, random_weights(path)


@pytest.fixture(scope="module")
def ours(weights: tuple[Path, str]) -> Inception:
    return Inception(weights[0], sha256=weights[1])


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return pictures(3, 40)


@pytest.fixture(scope="module")
def theirs(weights: tuple[Path, str], images: np.ndarray) -> Features:
    """What torch-fidelity's network gives; the tap, which it lacks, is hooked out of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other metrics it brings
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        network: nn.Module = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights[0])
        )
    seen: list[torch.Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: seen.append(output.clone()))  # type: ignore[union-attr,operator]
    pool, unbiased = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    tap = seen[0][:, :7]  # (B, 7, 17, 17)
    return {
        "pool": pool.numpy(),
        "logits": unbiased.numpy(),
        "spatial": tap.permute(0, 2, 3, 1).flatten(1).numpy(),
    }


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def apart(found: Features, theirs: Features) -> dict[str, float]:
    return {tap: distance(found[tap], theirs[tap]) for tap in ("pool", "spatial", "logits")}


def test_all_taps_are_torch_fidelitys(ours: Inception, images: np.ndarray, theirs: Features) -> None:
    found = ours.extract(images)
    assert {tap: values.shape for tap, values in found.items()} == {
        "pool": (3, 2048), "spatial": (3, 2023), "logits": (3, 1008),
    }  # fmt: skip
    assert max(apart(found, theirs).values()) < TOLERANCE
    # The random network tells pictures apart, or all of this would prove nothing.
    assert distance(found["pool"][0], found["pool"][1]) > 1e-2
    assert distance(found["spatial"][0], found["spatial"][1]) > 1e-2


def test_the_resize_starts_at_the_corner() -> None:
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    assert resize_like_tensorflow(ramp, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]


def test_a_file_that_is_not_the_known_one_is_refused(weights: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="6726825d") as caught:
        open_extractor("inception", weights=str(weights[0]))
    assert "evaluate.weights" in caught.value.remedy
    with pytest.raises(MissingError, match="No such file"):
        Inception(tmp_path / "nothing.pth")


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_another_layout_is_refused(change: str, weights: tuple[Path, str], tmp_path: Path) -> None:
    import hashlib

    state = torch.load(weights[0], weights_only=True)
    if change == "missing":
        del state["Mixed_5b.branch1x1.bn.running_var"]
    elif change == "unknown":
        state["AuxLogits.fc.weight"] = torch.zeros(1)
    else:
        state["Conv2d_1a_3x3.conv.weight"] = torch.zeros(32, 3, 5, 5)
    path = tmp_path / "other.pth"
    torch.save(state, path)
    with pytest.raises(MissingError, match="layout"):
        Inception(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_the_digest_is_fixed(weights: tuple[Path, str], ours: Inception) -> None:
    import hashlib

    assert ours.digest == hashlib.sha256(f"{weights[1]}|{_PREPROCESSING}".encode()).hexdigest()[:16]
