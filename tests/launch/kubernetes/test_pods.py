"""The rendered RayJob's own pods, really run: who gets the signal, what preStop does, what arrives in them.

podman runs the pods; the operator and the kubelet are stand-ins (operator.py, tests/pods.py): no live cluster was in
the loop. tests/e2e/test_pods.py trains in them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from diffussm.config import dump
from launch.kubernetes.grace import Grace
from launch.kubernetes.pods import SCRATCH
from launch.kubernetes.render import objects
from launch.target import Submission
from tests.launch.kubernetes import operator
from tests.launch.kubernetes.cases import submission
from tests.pods import Pods, wait

ODD = ["it's", 'say "x"', "two\nlines", "$(touch /tmp/pwned)", "`id`"]
ODD_SECRET = "se'cr\"et $x"  # noqa: S105
GRACE = Grace(save_s=5, drain_s=12, pod_s=30)
STAND_IN = Path(__file__).with_name("stand_in.py")
ALIVE = "import json, ray; ray.init(log_to_driver=False); from cluster import nodes; print('NODES', json.dumps("
ALIVE += "[[n.alive, n.drain_deadline_s is not None, n.resources.get('CPU', 0)] for n in nodes.nodes()]))"


def small() -> Submission:
    made = submission(head_memory_bytes=3 << 30, worker_memory_bytes=3 << 30, env_from_secrets=["bucket"])
    made.cfg.cluster.workers, made.cfg.cluster.workers_per_node, made.cfg.cluster.gpus_per_worker = 1, 1, 0
    made.cfg.cluster.cpus_per_worker = 1
    made.cfg.data.classes = ODD
    return replace(made, config=dump(made.cfg))


def play(pods: Pods, seconds: float, grace: Grace) -> list[str]:
    """The worker's pod with the stand-in as `ray`; the words that its first process got."""
    config_map, _, job = objects(small(), grace)
    made = operator.pod(job["spec"]["rayClusterSpec"], "worker", "worker", "10.78.0.9", "1", "token")
    line = next(each for each in made["spec"]["containers"][0]["env"] if each["name"] == "KUBERAY_GEN_RAY_START_CMD")
    line["value"] = line["value"].replace("ray start", f"python {STAND_IN} {seconds}")
    pods.secret("bucket", {"AWS_SECRET_ACCESS_KEY": ODD_SECRET})
    pods.secret("token", {operator.TOKEN_KEY: "0123456789abcdef" * 4})
    pods.connect("worker")
    pods.start(made, config_map)
    wait(lambda: "WORDS" in pods.logs("worker"), "the first process", 60, lambda: pods.logs("worker"))
    number, *words = json.loads(pods.logs("worker").split("WORDS ")[1].splitlines()[0])
    assert number == 1  # no shell is left before it: a shell would keep the signal to itself
    return list(words)


def test_the_first_process_gets_the_signal_by_preStop_and_whole_words(pods: Pods) -> None:
    """It leaves by itself after its save, long before the grace is over; everything arrives as it was given."""
    words = play(pods, 2.0, GRACE)
    assert words == [
        "--address=10.78.0.9:6379", "--block", "--dashboard-agent-listen-port=52365", "--memory=1",
        "--metrics-export-port=8080", "--num-cpus=1", "--num-gpus=0", "--object-store-memory=104857600",
    ]  # fmt: skip
    assert pods.exec("worker", "id", "-u").strip() == "1000"
    assert "Read-only file system" in pods.exec("worker", "touch", "/x", check=False)
    pods.exec("worker", "touch", *(f"{folder}/x" for folder in (*SCRATCH.values(), "/dev/shm")))  # noqa: S108
    told = json.loads(pods.exec("worker", "python", "-c", "import json, os; print(json.dumps(dict(os.environ)))"))
    assert told["AWS_SECRET_ACCESS_KEY"] == ODD_SECRET
    assert told["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "12"
    assert yaml.safe_load(pods.exec("worker", "cat", "/etc/diffussm/run.yaml"))["data"]["classes"] == ODD

    took = pods.evict("worker")
    assert 2.0 < took < GRACE.drain_s  # preStop sent the signal and waited no longer than needed
    assert "SIGNALS 1" in pods.logs("worker")
    assert pods.exit_code("worker") == 1


def test_a_process_that_stays_is_killed_when_the_grace_is_over(pods: Pods) -> None:
    short = Grace(save_s=1, drain_s=2, pod_s=4)
    play(pods, 60.0, short)
    took = pods.evict("worker")
    assert short.pod_s - 1 < took < short.pod_s + 6
    assert pods.exit_code("worker") == 137


@pytest.mark.long
def test_ray_is_the_first_process_and_is_drained(pods: Pods) -> None:
    """The worker's pod is evicted: Ray hears of it at once, and the pod is gone long before its grace is over."""
    config_map, _, job = objects(small(), GRACE)
    cluster = job["spec"]["rayClusterSpec"]
    pods.secret("bucket", {"AWS_SECRET_ACCESS_KEY": ODD_SECRET})
    pods.secret("token", {operator.TOKEN_KEY: "0123456789abcdef" * 4})
    head, _ = pods.connect("head"), pods.connect("worker")
    for name in ("head", "worker"):
        pods.start(operator.pod(cluster, name, name, head, f"{1 << 30}", "token"), config_map)
        if name == "head":
            wait(lambda: "Ray runtime started" in pods.logs("head"), "the head", 60, lambda: pods.logs("head"))

    for name in ("head", "worker"):
        first = pods.exec(name, "cat", "/proc/1/cmdline").split("\0")
        assert first[2:4] == ["start", "--head" if name == "head" else "--address=" + f"{head}:6379"], first
        assert "--num-gpus=0" in first
        assert "--block" in first

    def nodes() -> list[list[float]]:
        said = pods.exec("head", "python", "-P", "-c", ALIVE)
        return json.loads(said.split("NODES ")[1].splitlines()[0])

    wait(lambda: [True, False, 1] in nodes(), "the worker's node", 60, lambda: pods.logs("worker"))
    took = pods.evict("worker")
    assert took < GRACE.pod_s
    assert not pods.running("worker")
    assert pods.exit_code("worker") != 137  # nothing had to be killed
    assert "Draining for up to 12" in pods.logs("worker"), pods.logs("worker")
    print(f"an idle worker's pod left in {took:.1f} s of {GRACE.pod_s}")
