"""The official client against a FAKE API server: no live cluster was in the loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffussm.errors import ConfigError, MissingError, UsageError
from launch.kubernetes.names import RUN_LABEL
from launch.kubernetes.target import Kubernetes
from tests.launch.kubernetes import cases, fake
from tests.launch.kubernetes.cases import submission


@pytest.fixture
def api() -> fake.FakeApi:
    path = Path(cases.DEFINITIONS) / "ray.io_rayjobs.yaml"
    strict = yaml.load(path.read_text(), yaml.CSafeLoader) if cases.DEFINITIONS and path.is_file() else None
    return fake.FakeApi(strict or {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": ANY}}]}})


ANY: dict[str, Any] = {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True}


@pytest.fixture
def cluster(api: fake.FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    with fake.serve(api, tmp_path) as kubeconfig:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        yield Kubernetes("default")


def test_submit_creates_everything_and_the_job_owns_it(cluster: Kubernetes, api: fake.FakeApi) -> None:
    name = cluster.submit(submission())
    kinds = {kind: made for (kind, _, _), made in api.objects.items()}
    assert set(kinds) == {"rayjobs", "configmaps", "serviceaccounts"}
    uid = kinds["rayjobs"]["metadata"]["uid"]
    for kind in ("configmaps", "serviceaccounts"):
        assert kinds[kind]["metadata"]["ownerReferences"][0]["uid"] == uid
    assert kinds["rayjobs"]["metadata"]["labels"][RUN_LABEL] == "a-run"
    (job,) = cluster.jobs("a-run")
    assert (job.id, job.run, job.alive, job.root) == (name, "a-run", True, "s3://bucket/runs/a-run")
    assert cluster.jobs("another") == []


def test_a_measured_save_gives_the_pods_their_grace_and_a_sweep_is_refused(
    cluster: Kubernetes, api: fake.FakeApi
) -> None:
    name = cluster.submit(replace(submission(), measured_save_s=100.0))
    (group,) = api.objects["rayjobs", "default", name]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] == 245
    with pytest.raises(ConfigError, match="--sweep"):
        cluster.submit(replace(submission(), variants=(("seed=1",),)))


def test_a_second_job_of_the_same_name_is_refused_and_the_first_stays(cluster: Kubernetes, api: fake.FakeApi) -> None:
    cluster.submit(submission())
    before = dict(api.objects)
    with pytest.raises(UsageError, match="is there already"):
        cluster.submit(submission())
    assert api.objects == before


def test_states_are_the_operators_words(cluster: Kubernetes, api: fake.FakeApi) -> None:
    name = cluster.submit(submission())
    for state, alive in (("Initializing", True), ("Running", True), ("Retrying", True), ("Complete", False)):
        api.put_status(name, {"jobDeploymentStatus": state, "failed": 1})
        (job,) = cluster.jobs("a-run")
        assert (job.state, job.alive, job.restarts) == (state, alive, 1)


def test_following_tells_each_change_and_ends_with_the_job(cluster: Kubernetes, api: fake.FakeApi) -> None:
    name = cluster.submit(submission())
    (job,) = cluster.jobs("a-run")
    states: list[str] = []
    for now in cluster.follow(job, timeout_s=20):
        states.append(now.state)
        following = {"Created": "Running", "Running": "Failed"}.get(now.state)
        if following:
            threading.Thread(target=api.put_status, args=(name, {"jobDeploymentStatus": following})).start()
    assert states == ["Created", "Running", "Failed"]


def test_stop_suspends_and_now_deletes_with_all_that_it_owns(cluster: Kubernetes, api: fake.FakeApi) -> None:
    cluster.submit(submission())
    (job,) = cluster.jobs("a-run")
    assert "save and leave" in cluster.stop(job, now=False)
    assert cluster.jobs("a-run")[0].state == "Suspended"
    cluster.stop(job, now=True)
    assert api.objects == {}
    with pytest.raises(MissingError, match="is not there"):
        cluster.stop(job, now=True)


def test_who_has_no_right_is_told_which_and_nothing_remains(cluster: Kubernetes, api: fake.FakeApi) -> None:
    api.forbidden = frozenset({"create configmaps"})
    with pytest.raises(MissingError, match="no right to do this"):
        cluster.submit(submission())
    assert api.objects == {}


def test_who_may_not_read_definitions_leaves_the_check_to_the_server(cluster: Kubernetes, api: fake.FakeApi) -> None:
    api.forbidden = frozenset({"read definitions"})
    cluster.submit(submission())
    assert ("rayjobs", "default", "a-run") in api.objects


def test_an_operator_that_is_too_old_is_told_before_anything_is_created(cluster: Kubernetes, api: fake.FakeApi) -> None:
    spec = {"type": "object", "properties": {"entrypoint": {"type": "string"}}}
    old = {"type": "object", "properties": {"spec": spec, "apiVersion": {"type": "string"}, "kind": {"type": "string"}}}
    api.definition = {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": old}}]}}
    with pytest.raises(ConfigError, match="the cluster's KubeRay refuses the job"):
        cluster.submit(submission())
    assert api.objects == {}


def test_logs_are_those_of_the_newest_submitter(cluster: Kubernetes, api: fake.FakeApi) -> None:
    name = cluster.submit(submission())
    for pod, when in (("p1", "2026-01-01T00:00:00Z"), ("p2", "2026-01-02T00:00:00Z")):
        api.create("pods", "default", {"metadata": {"name": pod, "labels": {"job-name": name}}})
        api.objects["pods", "default", pod]["metadata"]["creationTimestamp"] = when
        api.logs[pod] = f"lines of {pod}"
    (job,) = cluster.jobs("a-run")
    assert list(cluster.logs(job, 10)) == ["lines of p2"]


def test_no_cluster_is_said_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(MissingError, match="no cluster is configured"):
        Kubernetes("default").jobs()
