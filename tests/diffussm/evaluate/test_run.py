from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffussm.checkpoint.store import open_store
from diffussm.errors import DataError
from diffussm.evaluate.extractors import Extractor
from diffussm.evaluate.metrics import frechet
from diffussm.evaluate.moments import merge
from diffussm.evaluate.reference import Floor, Reference, collect
from diffussm.evaluate.run import Result, compare, evaluate, score


class Colours(Extractor):
    """Mean colour of a picture: three features."""

    name, metric, dim, digest = "colours", "FD-Colours", 3, "c0ffee"

    def _features(self, images: np.ndarray) -> np.ndarray:
        return images.mean((1, 2)).astype(np.float32)


def pictures(count: int, low: int = 0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 256, (count, 4, 4, 3), dtype=np.uint8)


@pytest.fixture
def real() -> Reference:
    return Reference("c0ffee", collect([pictures(50)], Colours()), Floor(45.6, 25, 25))


def test_the_value_is_the_distance_from_the_real_pictures(real: Reference) -> None:
    fake = pictures(30, low=40, seed=1)
    steps: list[int] = []
    result = score([fake[:13], fake[13:]], real, Colours(), sampler={"steps": 250}, progress=steps.append)
    x, y = fake.mean((1, 2)), pictures(50).mean((1, 2))
    expected = frechet(x.mean(axis=0), np.cov(x.T), y.mean(axis=0), np.cov(y.T))
    assert result.value == pytest.approx(expected, rel=1e-4)
    assert (result.metric, result.n, result.reference_n, result.extractor) == ("FD-Colours", 30, 50, "c0ffee")
    assert (result.floor, result.floor_n, result.floor_rest) == (45.6, 25, 25)
    assert result.sampler == {"steps": 250}
    assert result.seconds >= 0
    assert steps == [13, 17]


def test_the_real_pictures_themselves_score_zero_and_darker_ones_more(real: Reference) -> None:
    assert score([pictures(50)], real, Colours()).value == pytest.approx(0, abs=1e-6)
    near = score([pictures(50, low=10, seed=1)], real, Colours()).value
    far = score([pictures(50, low=90, seed=1)], real, Colours()).value
    assert far > 10 * near


def test_shares_of_several_workers_give_the_same_value(real: Reference) -> None:
    fake = pictures(30, seed=2)
    parts = [collect([fake[:11]], Colours()), collect([fake[11:]], Colours())]
    together = score([fake], real, Colours()).value
    assert compare(merge(parts), real, Colours()).value == pytest.approx(together, rel=1e-9)


def test_the_line_names_metric_count_and_floor() -> None:
    result = Result("FD-EffLite0", 123.44, 2000, 3778, 45.61, 1889, 1889, "d", 1.0)
    assert result.line() == "FD-EffLite0 = 123.4 (n = 2000; real against real at n = 1889: 45.6)"


def test_the_result_is_stored_as_json(real: Reference, tmp_path: Path) -> None:
    result = score([pictures(30)], real, Colours(), sampler={"sampler": "ddpm", "steps": 250, "guidance": 1.5})
    store = open_store(str(tmp_path))
    result.save(store, "evaluations/000000000100-colours.json")
    stored = json.loads((tmp_path / "evaluations" / "000000000100-colours.json").read_text())
    assert Result(**stored) == result
    assert stored["sampler"]["steps"] == 250


def test_what_is_not_a_number_is_not_stored(tmp_path: Path) -> None:
    result = Result("FD-EffLite0", float("nan"), 2, 4, 0.0, 2, 2, "d", 1.0)
    with pytest.raises(ValueError, match="JSON compliant"):
        result.save(open_store(str(tmp_path)), "result.json")
    assert list(tmp_path.iterdir()) == []


def test_another_extractor_and_too_few_pictures_are_refused(real: Reference) -> None:
    other = Colours()
    other.digest = "decade"
    with pytest.raises(ValueError, match="c0ffee"):
        score([pictures(30)], real, other)
    with pytest.raises(DataError, match="found 1 generated"):
        score([pictures(1)], real, Colours())


def test_evaluate_prepares_the_reference_scores_and_holds_to_n(tmp_path: Path) -> None:
    store, steps = open_store(str(tmp_path)), list[int]()

    def run(n: int) -> Result:
        return evaluate(
            iter([pictures(8, seed=1), pictures(8, seed=2)]),
            Colours(),
            store,
            lambda: [pictures(40)],
            n=n,
            count=40,
            data="d",
            progress=steps.append,
        )

    result = run(16)
    assert (result.n, result.reference_n, result.floor_n, result.floor_rest) == (16, 40, 16, 24)
    assert result.value > 0
    assert result.floor > 0
    assert steps == [40, 8, 8]
    assert store.exists("reference-c0ffee.safetensors")
    with pytest.raises(DataError, match="found 16 generated pictures, expected 17"):
        run(17)
