from __future__ import annotations

import os

import pytest

from cluster import env
from diffussm.config.schema import ClusterConfig, Config


def test_every_variable_has_a_value_and_a_reason_once() -> None:
    variables = env.variables(Config())
    assert len({v.name for v in variables}) == len(variables)
    assert all(v.value and len(v.reason) > 10 for v in variables)


def test_threads_interval_and_device_follow_the_config() -> None:
    cluster = ClusterConfig(threads_per_worker=3, health_check_interval_s=1.5, gpus_per_worker=1)
    values = {v.name: v.value for v in env.variables(Config(cluster=cluster))}
    assert values["OMP_NUM_THREADS"] == "3"
    assert values["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "1.5"
    assert values["DS_ACCELERATOR"] == "cuda"


def test_a_cluster_of_our_own_gets_a_fresh_token_that_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (v.name for v in env.variables(Config())):
        monkeypatch.setenv(name, "before")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "x")
    given = env.apply(Config())
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_AUTH_TOKEN"] not in given.values()
    assert os.environ["RAY_TRAIN_V2_ENABLED"] == given["RAY_TRAIN_V2_ENABLED"] == "1"
    monkeypatch.delenv("RAY_AUTH_TOKEN")


def test_a_cluster_of_others_keeps_its_authentication(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (v.name for v in env.variables(Config())):
        monkeypatch.setenv(name, "before")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    env.apply(Config(cluster=ClusterConfig(address="ray://head:10001")))
    assert "RAY_AUTH_TOKEN" not in os.environ
