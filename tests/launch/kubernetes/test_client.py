"""What the connection makes of refusals and leftovers, against a FAKE API server: no live cluster was in the loop."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffussm.errors import ConfigError, MissingError
from launch.kubernetes import client
from launch.kubernetes.target import Kubernetes
from tests.launch.kubernetes import fake
from tests.launch.kubernetes.cases import submission


def test_what_the_garbage_collector_has_not_taken_yet_is_no_obstacle(cluster: Kubernetes, api: fake.FakeApi) -> None:
    name = cluster.submit(submission())
    api.collects_late = True
    api.put_status(name, {"jobDeploymentStatus": "Complete"})
    cluster.submit(replace(submission(), config="name: another\n"))
    assert api.objects["configmaps", "default", name]["data"]["run.yaml"] == "name: another\n"
    api.collect()
    assert len(api.objects) == 3


def test_who_may_not_delete_or_kill_is_told(cluster: Kubernetes, api: fake.FakeApi) -> None:
    cluster.submit(submission())
    (job,) = cluster.jobs("a-run")
    for forbidden, words in (("delete rayjobs", "RayJob a-run"), ("deletecollection pods", "pods of a-run")):
        api.forbidden = frozenset({forbidden})
        with pytest.raises(MissingError, match=f"no right to do this with {words}"):
            cluster.stop(job, now=True)


def test_who_has_no_right_is_told_which_and_nothing_remains(cluster: Kubernetes, api: fake.FakeApi) -> None:
    api.forbidden = frozenset({"create configmaps"})
    with pytest.raises(MissingError, match="no right to do this"):
        cluster.submit(submission())
    assert api.objects == {}


def test_of_a_submission_that_is_interrupted_nothing_remains(
    cluster: Kubernetes, api: fake.FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(made: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster.client, "_create_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cluster.submit(submission())
    assert api.objects == {}


def test_a_cluster_that_does_not_answer_is_not_waited_for_for_ever(
    cluster: Kubernetes, api: fake.FakeApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(client, "ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        server = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{deaf.getsockname()[1]}"}}
        given = {
            "clusters": [server],
            "contexts": [context],
            "users": [{"name": "u", "user": {}}],
            "current-context": "c",
        }
        (tmp_path / "deaf").write_text(yaml.safe_dump(given))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "deaf"))
        with pytest.raises(MissingError, match="cannot be reached"):
            Kubernetes("default").jobs()


def test_who_may_not_read_definitions_leaves_the_check_to_the_server(cluster: Kubernetes, api: fake.FakeApi) -> None:
    api.forbidden = frozenset({"read definitions"})
    cluster.submit(submission())
    assert ("rayjobs", "default", "a-run") in api.objects


def test_an_operator_that_is_too_old_is_told_before_anything_is_created(cluster: Kubernetes, api: fake.FakeApi) -> None:
    spec = {"type": "object", "properties": {"entrypoint": {"type": "string"}}}
    old = {"type": "object", "properties": {"spec": spec, "apiVersion": {"type": "string"}, "kind": {"type": "string"}}}
    api.definitions["rayjobs"] = {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": old}}]}}
    with pytest.raises(ConfigError, match="the cluster's KubeRay refuses the job"):
        cluster.submit(submission())
    assert api.objects == {}


def test_no_cluster_is_said_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(MissingError, match="no cluster is configured"):
        Kubernetes("default").jobs()


def test_without_a_namespace_it_is_that_of_the_context(cluster: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    anywhere = Kubernetes("")
    assert anywhere.client.namespace == "default"  # the context names none
    path = Path(os.environ["KUBECONFIG"])
    path.write_text(path.read_text().replace("user: fake\n", "user: fake\n    namespace: ml\n", 1))
    made = submission(namespace="ml")
    Kubernetes("ml").submit(made)
    assert [job.run for job in Kubernetes("").jobs("a-run")] == ["a-run"]
    assert cluster.jobs("a-run") == []
