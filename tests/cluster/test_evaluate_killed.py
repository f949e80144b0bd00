"""Evaluations whose process is killed by SIGKILL at each moment that writes or deletes something, and then resumed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray

from cluster import env
from cluster.evaluate import CURVE, JOURNAL, Job
from diffussm.checkpoint.store import LocalStore, Store, open_store
from diffussm.config.schema import Config
from diffussm.observe.events import read_journal
from tests.evaluations import agreed, results
from tests.s3 import S3Server

WAIT_S = 120
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cluster.evaluate", "diffussm.evaluate.custom", "ray", "tests.evaluations"])


@pytest.fixture
def store(scored: Config) -> LocalStore:
    return emptied(scored)


def emptied(cfg: Config) -> LocalStore:
    found = LocalStore(f"{cfg.storage}/{cfg.name}")
    for key in list(found.keys("evaluations")):
        found.delete(key)
    return found


@pytest.fixture(scope="module")
def expected(scored: Config) -> dict[str, Any]:
    """Key and result of one process that nothing disturbed."""
    Job(scored, emptied(scored), None, say=lambda line: None).here()
    return {key: agreed(result) for key, result in results(scored).items()}


@pytest.fixture(scope="module")
def address(scored: Config) -> Iterator[str]:
    """A cluster that outlives its drivers."""
    ray.init(
        address="local", num_cpus=4, runtime_env={"env_vars": env.apply(scored)}, object_store_memory=100 << 20,
        log_to_driver=False, logging_level="warning", include_dashboard=False,
    )  # fmt: skip
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def evaluate(cfg: Config, world: int, address: str, last: int | None) -> bool:
    """One evaluation in a process of its own, killed at its moment number `last`; whether it was.

    World 1 has no Ray and its moments are all writes and deletions; otherwise they are blocks that came back.
    """
    process = PROCESSES.Process(target=_evaluate, args=(cfg, world, address, last, dict(os.environ)))
    process.start()
    process.join(WAIT_S)
    if process.is_alive():
        process.kill()
        pytest.fail(f"the evaluation did not end within {WAIT_S} s")
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _evaluate(cfg: Config, world: int, address: str, last: int | None, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    moments = 0

    def tick(*_: Any) -> None:
        nonlocal moments
        moments += 1
        if moments == last:
            os.kill(os.getpid(), signal.SIGKILL)

    job = Job(cfg, open_store(f"{cfg.storage}/{cfg.name}"), None, say=lambda line: None)
    if world > 1:
        ray.init(address=address, runtime_env={"env_vars": env.apply(cfg)}, log_to_driver=False)
        job.progress = tick
        job.on_ray(world)
        ray.shutdown()
        return
    for name in ("_publish" if isinstance(job.store, LocalStore) else "write", "delete"):
        _around(type(job.store), name, tick)
    job.here()


def _around(store: type[Store], name: str, tick: Any) -> None:
    """Moments before and after each call of one of the store's verbs."""
    original = getattr(store, name)

    def wrapped(*arguments: Any) -> Any:
        tick()
        done = original(*arguments)
        tick()
        return done

    setattr(store, name, wrapped)


def check(cfg: Config, store: LocalStore, expected: dict[str, Any]) -> None:
    """The one result, told once, and nothing left over."""
    assert {key: agreed(result) for key, result in results(cfg).items()} == expected
    (line,) = read_journal(store, JOURNAL)
    assert line["key"] in expected
    assert store.read(CURVE).startswith(b"\x89PNG")
    assert store.read(line["key"].replace(".json", ".png")).startswith(b"\x89PNG")
    assert not (store.root / "evaluations/partial").exists()


@pytest.mark.parametrize("last", [1, 8, 16, 20])  # the long test has all
def test_killed_at_any_moment_it_goes_on(
    last: int, scored: Config, store: LocalStore, expected: dict[str, Any]
) -> None:  # fmt: skip
    """Before and after writing: the preview (1, 2), five blocks, the grid (13), the result (15), the curve (17);
    then six deletions."""
    assert evaluate(scored, 1, "", last)
    assert not evaluate(scored, 1, "", None)
    check(scored, store, expected)


@pytest.mark.long
def test_killed_at_every_moment_it_goes_on(scored: Config, expected: dict[str, Any]) -> None:
    last, is_killed = 0, True
    while is_killed:
        last, store = last + 1, emptied(scored)
        is_killed = evaluate(scored, 1, "", last)
        evaluate(scored, 1, "", None)
        check(scored, store, expected)
    assert last == 2 * 15 + 1


def test_a_run_in_a_bucket_has_the_same_result_after_two_kills(
    scored: Config, expected: dict[str, Any], s3_server: S3Server
) -> None:
    source, cfg = LocalStore(f"{scored.storage}/{scored.name}"), replace(scored, storage=s3_server.url("evaluated"))
    store = open_store(f"{cfg.storage}/{cfg.name}")
    for key in list(source.keys()):
        if not key.startswith("evaluations"):
            store.write(key, source.read(key))
    for last in (
        5,
        12,
    ):  # before the second block; then, of what was left, between the result and its line in the journal
        assert evaluate(cfg, 1, "", last)
    assert not evaluate(cfg, 1, "", None)
    (line,) = read_journal(store, JOURNAL)
    assert {line["key"]: agreed(json.loads(store.read(line["key"])))} == expected
    assert list(store.keys("evaluations/partial")) == []


@pytest.mark.long
def test_killed_again_and_again_it_comes_to_its_end(
    scored: Config, store: LocalStore, expected: dict[str, Any]
) -> None:
    """Each start lives a little longer than a block."""
    starts = 1
    while evaluate(scored, 1, "", 5):
        starts += 1
    assert starts > 4
    check(scored, store, expected)


@pytest.mark.parametrize(
    ("world", "last", "following"),
    [
        (2, 1, 4),
        *(
            pytest.param(world, last, following, marks=pytest.mark.long)
            for world, following in ((2, 2), (4, 4), (4, 1), (2, 4), (4, 2), (2, 1), (1, 2), (1, 4))
            for last in (1, 2, 3, 4, 5)
            if (world, last, following) != (2, 1, 4)
        ),
    ],
)
def test_killed_on_one_world_it_goes_on_on_another(
    world: int, last: int, following: int, scored: Config, store: LocalStore, address: str, expected: dict[str, Any]
) -> None:
    assert evaluate(scored, world, address, last if world > 1 else 2 * last)
    assert not evaluate(scored, following, address, None)
    check(scored, store, expected)
