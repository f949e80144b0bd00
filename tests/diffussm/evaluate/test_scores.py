from __future__ import annotations

import numpy as np
import pytest

from diffussm.errors import DataError
from diffussm.evaluate.intervals import groups
from diffussm.evaluate.metrics import frechet, inception_score, kid, softmax
from diffussm.evaluate.scores import RealSide, Tally

TAPS = {"pool": 3, "spatial": 2, "logits": 4}


def drawn(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {tap: rng.normal(0.4, 1.2, (n, length)).astype(np.float32) for tap, length in TAPS.items()}


def side() -> RealSide:
    real = np.random.default_rng(9).normal(size=(60, 3)).astype(np.float32)
    return RealSide({"pool": (np.zeros(3), np.eye(3)), "spatial": (np.zeros(2), np.eye(2))}, real)


def in_calls(features: dict[str, np.ndarray], *cuts: int) -> Tally:
    tally = Tally(TAPS, len(features["pool"]))
    for part in np.split(np.arange(tally.n), cuts):
        tally.add({tap: values[part] for tap, values in features.items()})
    return tally


@pytest.mark.parametrize("cuts", [(), (7,), (1, 2, 30, 31)])
def test_all_scores_and_their_intervals_are_those_of_the_whole_and_of_the_rest(cuts: tuple[int, ...]) -> None:
    x, real = drawn(43), side()
    found = in_calls(x, *cuts).scores(real)
    assert list(found) == ["frechet", "spatial", "inception", "kernel", "precision", "recall"]

    def expected(kind: str, kept: np.ndarray) -> float:
        if kind == "inception":
            return inception_score(softmax(x["logits"][kept]))
        if kind == "kernel":
            return kid(real.features, x["pool"][kept])
        tap = "pool" if kind == "frechet" else "spatial"
        mean, cov = real.statistics[tap]
        return frechet(
            mean, cov, x[tap][kept].mean(axis=0, dtype=np.float64), np.cov(x[tap][kept].T.astype(np.float64))
        )

    every = np.arange(43)
    for kind in ("frechet", "spatial", "inception", "kernel"):
        score = found[kind]
        assert score.value == pytest.approx(expected(kind, every), rel=1e-6), kind
        left = np.array([expected(kind, np.delete(every, cut)) for cut in groups(43)])
        error = np.sqrt(9 / 10 * ((left - left.mean()) ** 2).sum())
        assert score.interval is not None
        assert score.interval.high - score.value == pytest.approx(2.26216 * error, rel=1e-3), kind


def test_what_the_taps_or_the_real_side_lack_has_no_score() -> None:
    tally = Tally({"pool": 3}, 5)
    tally.add({"pool": drawn(5)["pool"]})
    assert list(tally.scores(side())) == ["frechet", "kernel", "precision", "recall"]
    assert list(tally.scores(RealSide(side().statistics, np.zeros((0, 3), np.float32)))) == ["frechet"]
    few = Tally({"pool": 3}, 2)
    few.add({"pool": drawn(2)["pool"]})
    assert list(few.scores(side())) == ["frechet", "kernel"]


def test_scores_are_bit_equal_from_run_to_run() -> None:
    one, two = (in_calls(drawn(300), 100, 200).scores(side()) for _ in range(2))
    assert one == two


def test_other_numbers_than_announced_are_refused() -> None:
    tally = Tally({"pool": 3}, 5)
    tally.add({"pool": drawn(4)["pool"]})
    with pytest.raises(DataError, match="found 4 generated pictures of 5"):
        tally.scores(side())
    with pytest.raises(DataError, match="at least 6"):
        tally.add({"pool": drawn(2)["pool"]})
    with pytest.raises(DataError, match="not finite"):
        Tally({"pool": 3}, 5).add({"pool": np.full((1, 3), np.nan, np.float32)})
