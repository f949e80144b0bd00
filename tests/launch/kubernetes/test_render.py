"""The rendered objects: what they say, what they must never say, and whether KubeRay's own schema takes them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffussm.config import check, dump
from diffussm.errors import ConfigError
from launch import submit
from launch.kubernetes import schema
from launch.kubernetes.grace import grace
from launch.kubernetes.names import LONGEST, object_name
from launch.kubernetes.render import objects, to_yaml
from tests.launch.kubernetes.cases import definition, submission

GRACE = grace(12.0)
GOLDEN = Path(__file__).parents[2] / "golden" / "kubernetes.yaml"
ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "docs" / "examples" / "imagenet-512-8-nodes.rayjob.yaml"
FULL: dict[str, Any] = {
    "queue": "team", "priority_class": "low", "node_selector": ["gpu=h100"], "tolerations": ["gpu=yes:NoSchedule"],
    "extra_resources": ["rdma/ib=2"], "env_from_secrets": ["bucket"], "image_pull_secrets": ["registry"],
    "claims": ["data=/data"], "deadline_s": 86_400,
}  # fmt: skip


def job(**changes: Any) -> dict[str, Any]:
    return objects(submission(**changes), GRACE)[-1]


def templates(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = made["spec"].get("rayClusterSpec", made["spec"])
    found = {"head": cluster["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    if "submitterPodTemplate" in made["spec"]:
        found["submitter"] = made["spec"]["submitterPodTemplate"]
    return found


def test_the_whole_text_is_as_it_was() -> None:
    """Golden: after a wanted change write it anew and read the difference."""
    text = to_yaml(objects(submission(**FULL), GRACE), GRACE)
    assert text == to_yaml(objects(submission(**FULL), GRACE), GRACE)
    assert text == GOLDEN.read_text()


def test_the_example_in_the_docs_is_what_submit_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    places = ["storage=s3://diffussm/runs", "data.latents=s3://diffussm/latents/imagenet-512"]
    more = ["data.images=s3://diffussm/imagenet/train", "kubernetes.image=registry.example.com/diffussm:0.1.0"]
    overlay = str(ROOT / "configs" / "cluster" / "kubernetes.yaml")
    made = submit.prepare(str(ROOT / "configs" / "imagenet-512.yaml"), [overlay, *places, *more])
    assert to_yaml(objects(made, grace(None)), grace(None)) == EXAMPLE.read_text()


@pytest.mark.parametrize("changes", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("interactive", [False, True], ids=["job", "cluster"])
def test_kuberay_takes_it(changes: dict[str, Any], interactive: bool) -> None:
    made = objects(replace(submission(**changes), interactive=interactive), GRACE)[-1]
    kind = "rayclusters" if interactive else "rayjobs"
    assert schema.errors(definition(kind), made) == []


def test_kuberay_refuses_what_it_does_not_know() -> None:
    made = job()
    made["spec"]["backoffLimits"] = made["spec"].pop("backoffLimit")
    made["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] = "2"
    wrong = schema.errors(definition("rayjobs"), made)
    assert len(wrong) == 2
    assert any("backoffLimits" in line for line in wrong)


@pytest.mark.parametrize("changes", [{}, FULL], ids=["plain", "full"])
def test_kubernetes_takes_the_pods_and_the_rest(changes: dict[str, Any]) -> None:
    made = objects(submission(**changes), GRACE)
    for each in made[:-1]:
        kubernetes_validate.validate(each, "1.30", strict=True)
    for name, template in templates(made[-1]).items():
        spec = template["spec"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name} | template["metadata"], "spec": spec}
        kubernetes_validate.validate(pod, "1.30", strict=True)


def test_two_nodes_of_four_gpus_and_a_head_without_any() -> None:
    cluster = job()["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (limits["nvidia.com/gpu"], limits["cpu"]) == ("4", "25")
    assert group["rayStartParams"]["num-cpus"] == "24"  # four ranks of six: Ray could put no fifth here
    head = cluster["headGroupSpec"]
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["num-gpus"]) == ("0", "0")
    assert cluster["authOptions"] == {"mode": "token"}


def test_a_part_of_a_gpu_is_a_whole_one_of_its_pod() -> None:
    made = submission()
    made.cfg.cluster.gpus_per_worker, made.cfg.cluster.workers_per_node = 0.5, 1
    (group,) = objects(made, GRACE)[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == 8
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert group["rayStartParams"]["num-gpus"] == "1"


def test_more_gpus_than_a_node_has_are_refused() -> None:
    made = submission()
    made.cfg.cluster.workers = made.cfg.cluster.workers_per_node = 64
    with pytest.raises(ConfigError, match=r"found 64 GPUs on one node; allowed: plan\.gpus_per_node=8"):
        objects(made, GRACE)


@pytest.mark.parametrize("key", ["checkpoint.local", "data.cache"])
def test_a_nodes_own_folder_must_be_one_that_pods_can_write(key: str) -> None:
    section, name = key.split(".")
    made = submission(claims=["data=/data"])
    for place in ("/dev/shm/a", "/tmp/a", "/data/a"):  # noqa: S108 - in pods
        setattr(getattr(made.cfg, section), name, place)
        objects(made, GRACE)
    for place in ("/local/a", "/etc/diffussm/a", "/database"):
        setattr(getattr(made.cfg, section), name, place)
        with pytest.raises(ConfigError, match=f"{key}: found {place}, which pods cannot write"):
            objects(made, GRACE)


def test_every_further_set_of_latents_must_be_seen() -> None:
    made = submission()
    made.cfg.data.more = ["512=/home/me/latents"]
    with pytest.raises(ConfigError, match=r"data\.more \(512\): found /home/me/latents, which pods do not see"):
        objects(made, GRACE)


@pytest.mark.parametrize("changes", [{}, FULL], ids=["plain", "full"])
def test_no_pod_has_a_privilege(changes: dict[str, Any]) -> None:
    made = objects(submission(**changes), GRACE)
    for name, template in templates(made[-1]).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["automountServiceAccountToken"] is False
        assert "hostNetwork" not in spec
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
    assert {each["kind"] for each in made} == {"ConfigMap", "ServiceAccount", "RayJob"}  # no role, no binding


def test_secrets_are_named_and_never_written() -> None:
    made = objects(submission(env_from_secrets=["bucket"]), GRACE)
    for name in ("head", "nodes"):
        container = templates(made[-1])[name]["spec"]["containers"][0]
        assert container["envFrom"] == [{"secretRef": {"name": "bucket"}}]
        assert not [e for e in container["env"] if "KEY" in e["name"] or "TOKEN" in e["name"] or "SECRET" in e["name"]]
    assert "Secret" not in {each["kind"] for each in made}


@given(st.floats(0, 3_000))
def test_grace_is_above_the_drain_and_the_drain_above_the_save(save_s: float) -> None:
    found = grace(save_s)
    assert save_s < found.drain_s < found.pod_s


def test_before_the_first_save_the_plan_counts_if_it_says_more_than_the_assumption() -> None:
    assert grace(None, 5.0) == grace(None)
    assert grace(None, 80.0).save_s == 80.0
    assert grace(7.0, 80.0).save_s == 7.0


def test_pods_get_the_grace_and_ray_its_drain() -> None:
    for name in ("head", "nodes"):
        spec = templates(job())[name]["spec"]
        assert spec["terminationGracePeriodSeconds"] == GRACE.pod_s
        env = {e["name"]: e["value"] for e in spec["containers"][0]["env"]}
        assert env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == str(GRACE.drain_s)
        assert f"-lt {GRACE.drain_s}" in spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2]
        assert spec["containers"][0]["command"][2].endswith("exec $KUBERAY_GEN_RAY_START_CMD")  # Ray is process 1


def test_a_queue_suspends_the_job_until_there_is_room_for_all() -> None:
    assert job()["spec"]["suspend"] is False
    queued = job(queue="team", priority_class="low")
    assert queued["spec"]["suspend"] is True
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "low"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": ""}, "kubernetes.image: found none"),
        ({"claims": ["data=/elsewhere"]}, "storage: found /data/runs, which pods do not see"),
    ],
)
def test_what_no_pod_can_do_is_refused(changes: dict[str, Any], words: str) -> None:
    made = submission(**changes)
    if "claims" in changes:
        made.cfg.storage = "/data/runs"
    with pytest.raises(ConfigError, match=words):
        objects(made, GRACE)
    if "claims" in changes:
        made.cfg.kubernetes.claims = ["data=/data"]
        objects(made, GRACE)


HOSTILE = ["$(reboot)", "a;b", "x'y", 'q"r', "line\nbreak", "`id`", "A" * 300, "ümlaut", "a b"]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "key",
    ["namespace", "image", "queue", "service_account", "env_from_secrets", "node_selector", "claims", "tolerations"],
)
def test_hostile_values_are_refused_before_anything_is_rendered(key: str, text: str) -> None:
    listed = key in ("env_from_secrets", "node_selector", "claims", "tolerations")
    made = submission(**{key: [text] if listed else text})
    with pytest.raises(ConfigError, match=f"kubernetes.{key}: found"):
        check(made.cfg)


@given(st.text(st.sampled_from("abz09._-"), min_size=1, max_size=63))
def test_any_run_name_becomes_a_name_that_kubernetes_takes(run: str) -> None:
    name = object_name(run)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= LONGEST
    assert object_name(run) == name


def test_different_runs_have_different_names() -> None:
    names = ["a.b", "a-b", "a_b", "1a", "run-1a", "a" * 50, "a" * 51]
    assert len({object_name(name) for name in names}) == len(names)


def test_a_config_with_any_text_travels_whole() -> None:
    made = submission()
    made.cfg.data.classes = ["it's", 'say "x"', "a\nb", "$(reboot)"]
    text = to_yaml(objects(replace(made, config=dump(made.cfg)), GRACE), GRACE)
    config_map = next(yaml.safe_load_all(text))
    assert yaml.safe_load(config_map["data"]["run.yaml"])["data"]["classes"] == made.cfg.data.classes
