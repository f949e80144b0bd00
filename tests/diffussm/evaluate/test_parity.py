"""Our scores beside torchmetrics', torch-fidelity's and plain float64 numpy; test_mutants.py makes mistakes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from diffussm.evaluate import moments
from diffussm.evaluate.custom import CustomExtractor
from diffussm.evaluate.metrics import frechet
from diffussm.evaluate.scores import RealSide, Score, Tally

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of metrics we do not use
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

DIM, REAL, FAKE = 12, 120, 90


class Patches(nn.Module):
    """A fixed random network of uint8 (B, 3, 8, 8) pictures: features (B, DIM)."""

    num_features = DIM

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(DIM, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)) / 14
        self.weight = weight  # no buffer: torchmetrics would turn it to float64

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x.float().flatten(1) / 64 @ self.weight.T)


def pictures(count: int, low: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(low, 256, (count, 2, 2, 3)).repeat(4, 1).repeat(4, 2)
    return (0.7 * coarse + 0.3 * rng.integers(0, 256, (count, 8, 8, 3))).astype(np.uint8)


REALS, FAKES = pictures(REAL, 0, 1), pictures(FAKE, 60, 2)


@pytest.fixture(scope="module")
def extractor() -> CustomExtractor:
    # The probe for the length of the features has 32 px; this network takes 8.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffussm.evaluate.custom._PROBE_PX", 8)
        return CustomExtractor(f"{__name__}:Patches")


def ours(extractor: CustomExtractor, fakes: np.ndarray = FAKES) -> dict[str, Score]:
    """Our whole path from pictures to scores, in uneven calls."""
    real = extractor.extract(REALS)["pool"]
    whole = moments.Accumulator(DIM)
    whole.add(real)
    found = whole.moments()
    tally = Tally(extractor.taps, len(fakes))
    for start in range(0, len(fakes), 37):
        tally.add(extractor.extract(fakes[start : start + 37]))
    return tally.scores(RealSide({"pool": (found.mean, found.covariance)}, real))


def torchmetrics_fid() -> float:
    metric = FrechetInceptionDistance(feature=Patches(), input_img_size=(3, 8, 8))
    metric.set_dtype(torch.float64)
    for images, is_real in ((REALS, True), (FAKES, False)):
        metric.update(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), real=is_real)
    return float(metric.compute())


def features_of(images: np.ndarray) -> np.ndarray:
    return Patches()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def numpy_fid() -> float:
    real, fake = (features_of(images).astype(np.float64) for images in (REALS, FAKES))
    p, q = np.cov(real.T), np.cov(fake.T)
    difference = real.mean(axis=0) - fake.mean(axis=0)
    return float(difference @ difference + np.trace(p + q - 2 * scipy.linalg.sqrtm(p @ q).real))


def fidelity_fid() -> float:
    real, fake = (torch.from_numpy(features_of(images)) for images in (REALS, FAKES))
    sides = [metric_fid.fid_features_to_statistics(side.double()) for side in (real, fake)]
    return float(metric_fid.fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"])


REFERENCES = {"torchmetrics": torchmetrics_fid, "torch-fidelity": fidelity_fid, "numpy in float64": numpy_fid}


@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES.keys())
def test_the_frechet_distance_is_theirs(reference: Callable[[], float], extractor: CustomExtractor) -> None:
    found = ours(extractor)["frechet"]
    assert found.value == pytest.approx(reference(), rel=1e-5)
    assert found.interval is not None
    assert found.interval.low < found.value < found.interval.high


def test_the_kernel_distance_is_theirs(extractor: CustomExtractor) -> None:
    reals, fakes = REALS[:FAKE], FAKES
    metric = KernelInceptionDistance(feature=Patches(), subsets=1, subset_size=FAKE)
    for images, is_real in ((reals, True), (fakes, False)):
        metric.update(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), real=is_real)
    theirs = float(metric.compute()[0])
    real, fake = features_of(reals), features_of(fakes)
    tally = Tally(extractor.taps, FAKE)
    tally.add({"pool": fake})
    found = tally.scores(RealSide({}, real))["kernel"]
    assert found.value == pytest.approx(theirs, rel=1e-4)
    fidelity = metric_kid.kid_features_to_metric(
        torch.from_numpy(fake).double(), torch.from_numpy(real).double(),
        kid_subsets=1, kid_subset_size=FAKE, verbose=False,
    )  # fmt: skip
    assert found.value == pytest.approx(fidelity["kernel_inception_distance_mean"], rel=1e-6)


def test_precision_and_recall_are_torch_fidelitys(extractor: CustomExtractor) -> None:
    found = ours(extractor)
    theirs = metric_prc.prc_features_to_metric(
        torch.from_numpy(features_of(FAKES)), torch.from_numpy(features_of(REALS)), prc_neighborhood=3, verbose=False
    )
    assert found["precision"].value == pytest.approx(theirs["precision"], abs=1e-6)
    assert found["recall"].value == pytest.approx(theirs["recall"], abs=1e-6)
    assert found["precision"].value != found["recall"].value
    assert 0.05 < min(found["precision"].value, found["recall"].value) < 0.98


def test_the_inception_score_is_torch_fidelitys() -> None:
    logits = np.random.default_rng(5).normal(0, 2, (10_000, 7)).astype(np.float32)
    tally = Tally({"pool": 1, "logits": 7}, len(logits))
    tally.add({"pool": np.ones((len(logits), 1), np.float32), "logits": logits})
    found = tally.scores(RealSide({}, np.zeros((0, 1), np.float32)))["inception"]
    theirs = metric_isc.isc_features_to_metric(torch.from_numpy(logits), splits=2, shuffle=False)
    assert found.value == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert found.interval is not None


@pytest.mark.parametrize("dim", [1, 16, 64])
def test_gaussians_have_their_closed_form(dim: int) -> None:
    """Commuting covariances in a random basis: |a - b|^2 + sum (s - t)^2."""
    rng = np.random.default_rng(dim)
    basis, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    s, t, a, b = rng.uniform(0.01, 3, (4, dim))
    expected = ((a - b) ** 2).sum() + ((s - t) ** 2).sum()
    p, q = (basis @ np.diag(x**2) @ basis.T for x in (s, t))
    assert frechet(a, (p + p.T) / 2, b, (q + q.T) / 2) == pytest.approx(expected, rel=1e-9)
