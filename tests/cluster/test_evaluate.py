"""An evaluation in this process and on real Ray workers: one result, whoever makes the blocks, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from cluster import env
from cluster.evaluate import CURVE, JOURNAL, Job, Pool, workers
from diffussm.checkpoint.store import LocalStore, Store
from diffussm.config.schema import ClusterConfig, Config, EvaluateConfig
from diffussm.errors import ConfigError, DataError
from diffussm.evaluate import blocks
from diffussm.evaluate.run import Result
from diffussm.observe.events import read_journal
from tests.evaluations import BATCH, agreed, results


@pytest.fixture(scope="module")
def cfg(scored: Config) -> Config:
    return scored


@pytest.fixture(scope="module")
def cluster(cfg: Config) -> Iterator[None]:
    ray.init(
        address="local", num_cpus=4, runtime_env={"env_vars": env.apply(cfg)}, object_store_memory=100 << 20,
        log_to_driver=False, logging_level="warning", include_dashboard=False,
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture
def store(cfg: Config) -> Store:
    found = LocalStore(f"{cfg.storage}/{cfg.name}")
    for key in list(found.keys("evaluations")):
        found.delete(key)
    return found


def job(cfg: Config, store: Store, said: list[str] | None = None, **more: Any) -> Job:
    return Job(cfg, store, more.pop("images", None), say=(said if said is not None else []).append, **more)


def dump(result: Result) -> dict[str, Any]:
    return agreed(json.loads(result.to_json()))


@pytest.fixture(scope="module")
def expected(cfg: Config) -> dict[str, Any]:
    """The result of one process that nothing disturbed."""
    store = LocalStore(f"{cfg.storage}/{cfg.name}")
    return dump(job(cfg, store).here())


def test_the_result_and_everything_beside_it_is_stored(cfg: Config, store: Store) -> None:
    said: list[str] = []
    seen: list[tuple[int, int]] = []
    result = job(cfg, store, said, progress=lambda done, total: seen.append((done, total))).here()
    assert seen == [(5, 24), (10, 24), (15, 24), (20, 24), (24, 24)]
    assert result.times["images_made"] == 24
    assert result.times["sample_s"] > 0
    assert any("pictures/s on 1 worker" in line for line in said)
    (key,) = results(cfg)
    assert store.read(key.replace(".json", ".png")).startswith(b"\x89PNG")
    assert store.read(CURVE).startswith(b"\x89PNG")
    (line,) = read_journal(store, JOURNAL)
    assert (line["event"], line["key"], line["images"]) == ("evaluated", key, 8 * BATCH)
    assert line["score/FD-Channels"] == result.scores["FD-Channels"]["value"]
    assert list(store.keys("evaluations/partial")) == []
    checkpoint = results(cfg)[key]["checkpoint"]
    assert (checkpoint["images"], checkpoint["weights"]) == (8 * BATCH, "ema-plain")


def test_the_same_evaluation_is_not_made_twice(cfg: Config, store: Store) -> None:
    first, said = job(cfg, store).here(), list[str]()
    again = job(cfg, store, said).here()
    assert again.to_json() == first.to_json()
    assert "evaluated already" in said[0]


@pytest.mark.parametrize("killed_after", [0, 1, 4])
def test_a_kill_at_any_block_costs_that_block_and_changes_nothing(
    killed_after: int, cfg: Config, store: Store, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    made: list[int] = []
    real = LocalStore.write

    def dying(self: LocalStore, key: str, data: bytes, *, create: bool = False) -> None:
        if "/partial/" in key and key.endswith(".safetensors"):
            if len(made) == killed_after:
                raise Killed
            made.append(1)
        real(self, key, data, create=create)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "write", dying)
        with pytest.raises(Killed):
            job(cfg, store).here()
    assert results(cfg) == {}
    said: list[str] = []
    found = job(cfg, store, said).here()
    assert dump(found) == expected
    assert found.times["images_made"] == 24 - 5 * killed_after
    assert killed_after == 0 or f"{killed_after} of 5 blocks are there" in said[0]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("count", [2, 4])
def test_one_two_and_four_ray_workers_give_one_result(
    count: int, cfg: Config, store: Store, expected: dict[str, Any]
) -> None:
    found = job(cfg, store).on_ray(count)
    assert dump(found) == expected
    assert found.times["workers"] == count


@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_is_replaced_and_changes_nothing(
    cfg: Config, store: Store, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    result = Pool._result

    def killing(self: Pool, ref: Any) -> Any:
        found = result(self, ref)
        if isinstance(found, blocks.Report) and not killed:
            ours = psutil.Process().children(recursive=True)
            killed.append(next(process.pid for process in ours if "ray::Seat" in " ".join(process.cmdline())))
            os.kill(killed[0], signal.SIGKILL)
        return found

    monkeypatch.setattr(Pool, "_result", killing)
    said: list[str] = []
    found = job(cfg, store, said).on_ray(2)
    assert len(killed) == 1
    assert any("a worker was lost (1 of at most 3)" in line for line in said)
    assert dump(found) == expected


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_a_users_error_comes_out_as_it_was_raised(cfg: Config, store: Store) -> None:
    with pytest.raises(DataError, match="no usable checkpoint after 9 images"):
        job(cfg, store, images=9).on_ray(2)
    wrong = replace(cfg, evaluate=replace(cfg.evaluate, extractor="no.such:network"))
    with pytest.raises(ConfigError, match="No module named"):
        job(wrong, store).on_ray(1)


def test_pictures_are_written_for_adms_script(
    cfg: Config, store: Store, expected: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "samples.npz"
    found = job(cfg, store, npz=str(path)).here()
    assert dump(found) == expected
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        pictures = archive["arr_0"]
    assert (pictures.shape, pictures.dtype) == ((24, 8, 8, 3), np.uint8)
    assert len({picture.tobytes() for picture in pictures}) == 24


def test_a_reference_is_looked_at_before_a_picture_is_drawn(cfg: Config, store: Store, tmp_path: Path) -> None:
    path = tmp_path / "real.npz"
    other = replace(cfg, evaluate=replace(cfg.evaluate, reference=str(path)))
    with pytest.raises(DataError, match="is no file"):
        job(other, store).here()
    assert list(store.keys("evaluations")) == []
    pictures = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    found = []
    for content in (pictures, pictures // 2):
        np.savez(path, arr_0=content)
        found.append(job(other, store).here())
    assert found[0].reference["digest"] == found[0].settings["reference_digest"]
    assert found[0].scores != found[1].scores  # the second is not the first one, read again
    assert len(results(cfg)) == 2


def test_an_evaluation_has_its_own_number_of_workers_or_the_trainings() -> None:
    cluster = ClusterConfig(workers=3)
    assert workers(Config(cluster=cluster)) == 3
    assert workers(Config(cluster=cluster, evaluate=EvaluateConfig(workers=2))) == 2
