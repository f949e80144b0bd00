"""The whole path from latents to scores, ours and one made of others' parts, and the check that the two agree.

Ours: decoder, uint8 pictures, blocks in a store, the Inception network, moments, scores. Theirs: plain numpy after
diffusers' decoder, torch-fidelity's network, and formulas in float64 that need no covariance matrix. Both start from
latents, a file of random weights in the layout of the FID weights, and a reference with statistics as ADM publishes.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffussm.checkpoint.store import open_store
from diffussm.data.autoencoder import Autoencoder
from diffussm.data.autoencoder import load as load_autoencoder
from diffussm.evaluate.adm import read_reference
from diffussm.evaluate.inception import Inception
from diffussm.evaluate.reference import Reference
from tests.diffussm.evaluate.fid_weights import random_weights

TOLERANCE = 1e-4
"""Relative, of a score; features agree to 1e-5."""
FAKE, REAL = 3, 6
SCORES = ("FID", "sFID", "IS")
"""The last one without the 1 that pictures of one kind have: random weights tell little more."""


@dataclass(frozen=True)
class Case:
    """What both sides start from, and what theirs gives."""

    folder: Path
    latents: Tensor
    """(FAKE, C, h, w)."""
    autoencoder: Autoencoder
    weights: tuple[Path, str]
    """File and its SHA-256."""
    reference: Reference
    expected: dict[str, float]


def prepare(folder: Path) -> Case:
    """Draw latents, write weights and reference, and let their side score."""
    path = folder / "random.pth"
    weights = path, random_weights(path, logits=0.02)
    autoencoder = load_autoencoder("builtin:emoji-32")
    latents = torch.randn((FAKE + REAL, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    found = their_features(path, plainly_decoded(autoencoder, latents))
    fakes = {tap: values[:FAKE] for tap, values in found.items()}
    reals = {tap: values[FAKE:] for tap, values in found.items()}
    statistics = {}
    for tap, (mean, covariance) in {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}.items():
        statistics |= {mean: reals[tap].mean(axis=0), covariance: np.cov(reals[tap].T)}
    np.savez(folder / "reference.npz", **statistics)
    reference = read_reference(
        folder / "reference.npz", Inception(path, sha256=weights[1]), open_store(str(folder / "kept")), 4
    )
    expected = {
        "FID": plain_frechet(fakes["pool"], reals["pool"]),
        "sFID": plain_frechet(fakes["spatial"], reals["spatial"]),
        "IS": plain_inception_score(fakes["logits"]) - 1,
    }
    return Case(folder, latents[:FAKE], autoencoder, weights, reference, expected)


def plainly_decoded(autoencoder: Autoencoder, latents: Tensor) -> np.ndarray:
    """Pictures as the protocol has them: clipped, then cut to uint8."""
    with torch.no_grad():
        x = autoencoder.network.decode(latents / autoencoder.scaling_factor + autoencoder.shift).sample.numpy()
    return np.clip(127.5 * x + 128, 0, 255).astype(np.uint8)  # (B, 3, H, W)


def their_features(weights: Path, pictures: np.ndarray) -> dict[str, np.ndarray]:
    """What torch-fidelity's network gives for uint8 (B, 3, H, W); the tap, which it lacks, is hooked out of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other metrics it brings
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        network: Any = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
        )
    seen: list[Tensor] = []
    unit: nn.Module = network.Mixed_6d.branch1x1
    unit.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    pool, logits = network(torch.from_numpy(pictures))
    spatial = seen[0][:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 2023)
    return {"pool": pool.double().numpy(), "spatial": spatial.double().numpy(), "logits": logits.double().numpy()}


def plain_frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Frechet distance from the features themselves: with C^T C a covariance, tr (A B)^1/2 is the sum of the
    singular values of C_a C_b^T."""
    a, b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (one, other))
    difference = one.mean(axis=0) - other.mean(axis=0)
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(difference @ difference + (a * a).sum() + (b * b).sum() - 2 * overlap)


def plain_inception_score(logits: np.ndarray) -> float:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return float(np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean()))


def score(case: Case, folder: Path, wanted: Sequence[str] = SCORES) -> dict[str, float]:
    """Our scores, the blocks made as by two ranks; modules are asked for at each call, so that they may be mutants.

    Decompositions of 2048 x 2048 take seconds, so only the distances of `wanted` are computed.
    """
    blocks, run, inception = (importlib.import_module(f"diffussm.evaluate.{m}") for m in ("blocks", "run", "inception"))
    autoencoder = importlib.import_module("diffussm.data.autoencoder")
    path, digest = case.weights
    extractor = inception.Inception(path, sha256=digest)
    decoder = autoencoder.Autoencoder(case.autoencoder.network, "builtin:emoji-32", "")

    def paint(labels: Sequence[int], first: int) -> Any:
        return decoder.decode(case.latents[first : first + len(labels)])

    plan = blocks.Plan(labels=(0,) * FAKE, block=2, batch=2, extract_batch=2, settings={})
    store = open_store(str(folder))
    for rank in (1, 0):
        for index in range(rank, plan.count, 2):
            blocks.make(store, plan, index, paint, extractor)
    side = case.reference.side
    taps = {tap for tap, name in (("pool", "FID"), ("spatial", "sFID")) if name in wanted}
    gaussians = {tap: whole for tap, whole in side.gaussians.items() if tap in taps}
    real: Any = _Decomposed(gaussians, side.features)
    reference = Reference(case.reference.digest, extractor.digest, "", 0, real, None)
    found = run.judge(
        blocks.features(store, plan, extractor.taps), FAKE, reference, extractor, checkpoint={}, settings={}
    )
    return {name: found.scores[name]["value"] - (name == "IS") for name in wanted}


@dataclass(frozen=True)
class _Decomposed:
    """A real side whose decompositions are made once for all mutants."""

    gaussians: dict[str, Any]
    features: np.ndarray


def check(case: Case, found: dict[str, float]) -> None:
    """Raise AssertionError unless the scores are theirs."""
    for name, value in found.items():
        assert value == pytest.approx(case.expected[name], rel=TOLERANCE), name
