"""The official client against a FAKE API server: no live cluster was in the loop."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from diffussm.errors import ConfigError, MissingError, UsageError
from launch.kubernetes.names import MANAGED_LABEL, RUN_LABEL
from launch.kubernetes.target import Kubernetes
from launch.target import Streams
from tests.launch.kubernetes import fake
from tests.launch.kubernetes.cases import submission


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


def test_following_goes_on_with_the_next_attempt_and_ends_with_the_job(cluster: Kubernetes, api: fake.FakeApi) -> None:
    name = cluster.submit(submission())
    labels = {"job-name": name}

    def attempt(pod: str, phase: str) -> None:
        api.logs[pod] = f"lines of {pod}"
        api.create("pods", "default", {"metadata": {"name": pod, "labels": labels}, "status": {"phase": phase}})

    attempt("p1", "Running")
    (job,) = cluster.jobs("a-run")
    told = cluster.stream(job, 10)
    assert next(told) == "lines of p1"
    attempt("p2", "Pending")
    for state in ("Retrying", "Initializing"):
        api.put_status(name, {"jobDeploymentStatus": state})

    def start() -> None:
        api.objects["pods", "default", "p2"]["status"] = {"phase": "Running"}
        api.put_status(name, {"jobDeploymentStatus": "Running"})

    assert list(cluster.logs(job, 10)) == ["lines of p1"]  # a pending pod has no log
    api.on_watch = start
    assert next(told) == "lines of p2"
    api.put_status(name, {"jobDeploymentStatus": "Complete"})
    assert list(told) == []


def test_following_ends_when_the_job_is_deleted(cluster: Kubernetes, api: fake.FakeApi) -> None:
    name = cluster.submit(submission())
    (job,) = cluster.jobs("a-run")
    api.on_watch = lambda: api.delete("rayjobs", "default", name)
    assert list(cluster.stream(job, 10)) == []
    assert list(cluster.stream(job, 10)) == []


def test_stop_suspends_and_now_deletes_with_all_that_it_owns(cluster: Kubernetes, api: fake.FakeApi) -> None:
    cluster.submit(submission())
    (job,) = cluster.jobs("a-run")
    assert "save and leave" in cluster.stop(job, now=False)
    (stopped,) = cluster.jobs("a-run")
    assert (stopped.state, stopped.alive) == ("Suspended", False)
    for pod, run in (("p1", "a-run"), ("p2", "another")):
        api.create("pods", "default", {"metadata": {"name": pod, "labels": {RUN_LABEL: run}}})
    cluster.stop(job, now=True)
    assert list(api.objects) == [("pods", "default", "p2")]
    api.objects.clear()
    assert api.objects == {}
    with pytest.raises(MissingError, match="is not there"):
        cluster.stop(job, now=True)


def test_a_job_that_was_stopped_or_has_ended_is_replaced(cluster: Kubernetes, api: fake.FakeApi) -> None:
    name = cluster.submit(submission())
    cluster.stop(cluster.jobs("a-run")[0], now=False)
    api.put_status(name, {"jobDeploymentStatus": "Running"})  # its pods are still saving
    with pytest.raises(UsageError, match="suspending: is there already"):
        cluster.submit(submission())
    for state in ("Suspended", "Complete", "Failed", "ValidationFailed"):
        before = api.objects["rayjobs", "default", name]["metadata"]["uid"]
        api.put_status(name, {"jobDeploymentStatus": state})
        assert cluster.submit(submission()) == name
        made = api.objects["rayjobs", "default", name]
        assert made["metadata"]["uid"] != before
        assert made["spec"]["suspend"] is False
        for kind in ("configmaps", "serviceaccounts"):
            assert (
                api.objects[kind, "default", name]["metadata"]["ownerReferences"][0]["uid"] == made["metadata"]["uid"]
            )


def test_an_object_of_somebody_else_is_never_replaced(cluster: Kubernetes, api: fake.FakeApi) -> None:
    strange = {"metadata": {"name": "a-run", "labels": {}}, "status": {"jobDeploymentStatus": "Complete"}}
    api.objects["rayjobs", "default", "a-run"] = strange | {"spec": {}}
    before = json.dumps(api.objects["rayjobs", "default", "a-run"])
    with pytest.raises(UsageError, match="is not this run's"):
        cluster.submit(submission())
    assert json.dumps(api.objects["rayjobs", "default", "a-run"]) == before
    del api.objects["rayjobs", "default", "a-run"]
    api.create("configmaps", "default", {"metadata": {"name": "a-run"}, "data": {}})
    with pytest.raises(UsageError, match="ConfigMap a-run is there already"):
        cluster.submit(submission())
    assert list(api.objects) == [("configmaps", "default", "a-run")]


def test_a_job_that_waits_in_its_queue_is_alive_and_stopping_it_deletes_it(
    cluster: Kubernetes, api: fake.FakeApi
) -> None:
    """Kueue starts a suspended job as soon as it has room: only a deleted one stays away."""
    cluster.submit(submission(queue="team"))
    (job,) = cluster.jobs("a-run")
    assert (job.state, job.alive) == ("Waiting in its queue", True)
    with pytest.raises(UsageError, match="is there already"):
        cluster.submit(submission(queue="team"))
    assert "deleted; its pods save and leave" in cluster.stop(job, now=False)
    assert api.objects == {}


def test_a_cluster_to_work_in_is_seen_and_stopped_by_the_same_verbs(cluster: Kubernetes, api: fake.FakeApi) -> None:
    said = cluster.submit(replace(submission(), interactive=True))
    assert "kubectl exec --namespace default --stdin --tty service/a-run-head-svc -- bash" in said
    assert {kind for kind, _, _ in api.objects} == {"rayclusters", "configmaps", "serviceaccounts"}
    made = {"kind": "RayCluster", "metadata": {"name": "x", "labels": {RUN_LABEL: "a-run", MANAGED_LABEL: "diffussm"}}}
    api.objects["rayclusters", "default", "x"] = made  # an operator's own, of a RayJob
    (job,) = cluster.jobs("a-run")
    assert (job.id, job.state, job.alive) == ("raycluster/a-run", "interactive: created", True)
    with pytest.raises(UsageError, match="is there already"):
        cluster.submit(submission())  # not beside it: both would write one run
    cluster.stop(job, now=False)
    assert list(api.objects) == [("rayclusters", "default", "x")]


@pytest.mark.parametrize("run", ["A.b_c", "9" * 63, "a" * 63, "x-", "-".join("ab" * 15)])
def test_any_name_of_a_run_is_found_again_by_it(cluster: Kubernetes, api: fake.FakeApi, run: str) -> None:
    made = submission()
    made.cfg.name = run
    name = cluster.submit(made)
    assert [(job.id, job.run) for job in cluster.jobs(run)] == [(name, run)]
    cluster.stop(cluster.jobs(run)[0], now=True)
    assert api.objects == {}


def test_logs_are_those_of_the_newest_submitter(cluster: Kubernetes, api: fake.FakeApi) -> None:
    name = cluster.submit(submission())
    for pod, when in (("p1", "2026-01-01T00:00:00Z"), ("p2", "2026-01-02T00:00:00Z")):
        api.create("pods", "default", {"metadata": {"name": pod, "labels": {"job-name": name}}})
        api.objects["pods", "default", pod]["metadata"]["creationTimestamp"] = when
        api.logs[pod] = f"lines of {pod}"
    (job,) = cluster.jobs("a-run")
    assert list(cluster.logs(job, 10)) == ["lines of p2"]
    api.logs["p2"] = "one\n\nthr\u00e9e\nno end"
    assert isinstance(cluster, Streams)
    api.put_status(name, {"jobDeploymentStatus": "Complete"})
    assert list(cluster.stream(job, 10)) == ["one", "", "thr\u00e9e", "no end"]
    with pytest.raises(UsageError, match="runs no job"):
        list(cluster.logs(replace(job, id="raycluster/a-run"), 10))
