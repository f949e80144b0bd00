from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffussm.checkpoint.store import open_store
from diffussm.errors import DataError
from diffussm.evaluate.metrics import frechet
from diffussm.evaluate.reference import Floor, Reference
from diffussm.evaluate.run import Result, code, judge
from diffussm.evaluate.scores import RealSide
from tests.diffussm.evaluate.test_extractors import Colours

CHECKPOINT = {"images": 640, "weights": "plain", "digest": "w"}


def colours(count: int, low: int = 0, seed: int = 0) -> np.ndarray:
    images = np.random.default_rng(seed).integers(low, 256, (count, 4, 4, 3), dtype=np.uint8)
    return Colours().extract(images)["pool"]


@pytest.fixture
def real() -> Reference:
    x = colours(50).astype(np.float64)
    side = RealSide({"pool": (x.mean(axis=0), np.cov(x.T))}, colours(50))
    return Reference("r", "c0ffee", "data", 50, side, Floor({"frechet": 45.64, "kernel": 0.01}, 25, 25))


def result(real: Reference, low: int = 0, seed: int = 1) -> Result:
    x = colours(30, low, seed)
    return judge(
        [{"pool": x[:13]}, {"pool": x[13:]}], 30, real, Colours(), checkpoint=CHECKPOINT, settings={"steps": 250}
    )


def test_the_first_score_is_the_distance_of_the_generated_from_the_real_pictures(real: Reference) -> None:
    found = result(real, low=40)
    x, y = colours(30, 40, 1).astype(np.float64), colours(50).astype(np.float64)
    score = found.scores["FD-Colours"]
    assert found.first == "FD-Colours"
    assert score["value"] == pytest.approx(frechet(x.mean(axis=0), np.cov(x.T), y.mean(axis=0), np.cov(y.T)), rel=1e-6)
    assert score["interval"][0] < score["value"] < score["interval"][1]
    assert score["floor"] == 45.64
    assert found.scores["precision-Colours"]["floor"] is None
    assert found.floor == {"n": 25, "rest": 25}
    assert found.reference == {"digest": "r", "source": "data", "n": 50, "features": 50}
    assert found.settings == {"steps": 250, "neighbour": 3, "kernel_images": 30}
    assert found.code == code()
    assert len(code()["digest"]) == 16


def test_darker_pictures_score_worse(real: Reference) -> None:
    near, far = (result(real, low).scores["FD-Colours"]["value"] for low in (10, 90))
    assert far > 10 * near


def test_the_line_names_metric_count_interval_and_floor(real: Reference) -> None:
    line = result(real).line()
    score = result(real).scores["FD-Colours"]
    assert line.startswith(f"FD-Colours = {score['value']:.1f} (n = 30; 95 %: {score['interval'][0]:.1f} to ")
    assert "; real against real at n = 25: 45.6); KD-Colours " in line
    assert "recall-Colours" in line
    without = replace(result(real), floor=None, scores={"FID": {"value": 2.0, "interval": None, "floor": None}})
    assert without.line() == "FID = 2.0 (n = 30)"


def test_the_result_is_stored_as_json_and_read_again(real: Reference, tmp_path: Path) -> None:
    found = result(real)
    store = open_store(str(tmp_path))
    found.save(store, "evaluations/000000000640-colours.json")
    text = (tmp_path / "evaluations" / "000000000640-colours.json").read_text()
    assert Result.from_json(text, "x").to_json() + "\n" == text
    assert list(json.loads(text)["scores"]) == ["FD-Colours", "KD-Colours", "precision-Colours", "recall-Colours"]
    with pytest.raises(DataError, match="no result"):
        Result.from_json("{}", "x")
    with pytest.raises(DataError, match="version 1"):
        Result.from_json(replace(found, version=1).to_json(), "x")


def test_what_is_not_a_number_is_not_stored(real: Reference, tmp_path: Path) -> None:
    broken = replace(result(real), times={"seconds": float("nan")})
    with pytest.raises(ValueError, match="JSON compliant"):
        broken.save(open_store(str(tmp_path)), "result.json")
    assert list(tmp_path.iterdir()) == []


def test_a_record_has_each_score_with_interval_and_floor(real: Reference) -> None:
    record = result(real).record()
    assert record["images"] == 640
    assert record["score/FD-Colours/low"] < record["score/FD-Colours"] < record["score/FD-Colours/high"]
    assert record["score/FD-Colours/floor"] == 45.64
    assert "score/recall-Colours/floor" not in record


def test_another_extractor_and_another_count_are_refused(real: Reference) -> None:
    with pytest.raises(ValueError, match="decade"):
        judge([], 2, replace(real, extractor="decade"), Colours(), checkpoint={}, settings={})
    with pytest.raises(DataError, match="found 30 generated pictures of 31"):
        judge([{"pool": colours(30)}], 31, real, Colours(), checkpoint={}, settings={})
