"""Real training in the pods of a rendered RayJob: evicted, saved, made anew, resumed, the same result.

podman runs the pods; operator and kubelet are stand-ins (tests/launch/kubernetes/operator.py, tests/pods.py). No live
cluster was in the loop.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from diffussm.config import check, dump, load
from diffussm.config.schema import Config
from launch.kubernetes.grace import grace
from launch.kubernetes.render import objects
from launch.target import Submission
from tests.e2e import undisturbed
from tests.launch.kubernetes import operator
from tests.pods import USER, Pods, wait
from tests.runs import BATCH, final_losses, tiny_run

STEPS = 600
NEVER = 10**9
WAIT_S = 300
STARTS = 4
SECRET = "ray"  # noqa: S105 - its name


def config(folder: Path) -> Config:
    """A run that saves only when it is told to go, so that resuming shows that save."""
    cfg = tiny_run(folder, workers=2, images=STEPS * BATCH, checkpoint_images=NEVER)
    cfg.train.ema_snapshot_images = NEVER
    cfg.cluster.workers_per_node, cfg.cluster.cpus_per_worker, cfg.evaluate.enabled = 1, 1, False
    kube = cfg.kubernetes
    kube.image, kube.claims = "localhost/diffussm:test", [f"data={folder}"]
    kube.head_memory_bytes, kube.worker_memory_bytes, kube.shm_bytes = 4 << 30, 4 << 30, 1 << 30
    check(cfg)
    for path in (folder, *folder.rglob("*")):
        shutil.chown(path, USER, USER)
    return cfg


@dataclass
class Job:
    """The operator's part for one RayJob: a cluster of pods for each try."""

    pods: Pods
    objects: list[dict[str, Any]]
    root: Path
    tries: int = 0
    alive: list[str] = field(default_factory=list)

    def start(self) -> None:
        """A new cluster, and the pod that hands it the job."""
        self.tries += 1
        spec, config_map = self.objects[-1]["spec"], self.objects[0]
        address = self.pods.connect(self.name("head"))
        for kind, name in (("head", "head"), ("worker", "worker-0"), ("worker", "worker-1")):
            if kind == "worker":
                self.pods.connect(self.name(name))
            made = operator.pod(spec["rayClusterSpec"], kind, self.name(name), address, f"{2 << 30}", SECRET)
            self.alive.append(self.name(name))
            self.run(made, config_map)
        self.pods.connect(self.name("submitter"))
        self.pods.start(operator.submitter(spec, self.name("submitter"), address, SECRET, f"try-{self.tries}"))

    def run(self, pod: dict[str, Any], config_map: dict[str, Any]) -> None:
        """Start a pod until Ray runs in it; one that ends before is made again, as the operator does."""
        name = pod["metadata"]["name"]
        for _ in range(STARTS):
            self.pods.start(pod, config_map)
            wait(lambda: self.began(name) or not self.pods.running(name), f"Ray in {name}", WAIT_S, self.told)
            if self.began(name):
                return
            print(f"{name} is started again: {self.pods.logs(name)[-300:]}")
            self.pods.remove(name)
        raise AssertionError(f"Ray did not start in {name}, {STARTS} times")

    def began(self, name: str) -> bool:
        return "Ray runtime started" in self.pods.logs(name)

    def name(self, part: str) -> str:
        return f"{part}-{self.tries}"

    def evict(self, *parts: str) -> tuple[threading.Thread, float]:
        """Begin to evict pods, all at once; the thread that does, and when it began."""
        thread = threading.Thread(target=self.pods.evict_all, args=([self.name(part) for part in parts],))
        began = time.time()
        thread.start()
        return thread, began

    def end(self) -> str:
        """Wait for the driver's end and take the cluster down; what the submitter said."""
        submitter = self.name("submitter")
        wait(lambda: not self.pods.running(submitter), "the end of the job", WAIT_S, self.told)
        said = self.pods.logs(submitter)
        for name in [*self.alive, submitter]:
            self.pods.remove(name)
        self.alive.clear()
        return said

    def steps(self) -> list[dict[str, Any]]:
        path = self.root / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.root / "events.jsonl"
        every = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [each for each in every if each["event"] == kind]

    def told(self) -> str:
        return "\n".join(f"--- {name}\n{self.pods.logs(name)[-3000:]}" for name in self.pods.manifests)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("parts", [("worker-1",), ("head",), ("worker-0", "worker-1", "head")], ids="+".join)
def test_evicted_pods_save_and_their_successors_end_as_if_nothing_had_happened(
    pods: Pods, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    """A worker, the head, all pods at once (as `diffussm stop` does): each time nothing is lost."""
    cfg = config(tmp_path / "data")
    pods.claim("data", tmp_path / "data")
    pods.secret(SECRET, {operator.TOKEN_KEY: "0123456789abcdef" * 4})
    job = Job(pods, objects(Submission(cfg, dump(cfg)), grace(None)), tmp_path / "data" / "runs" / "tiny")

    job.start()
    wait(lambda: job.steps()[99:], "a hundred steps", WAIT_S, job.told)
    evicting, warned = job.evict(*parts)
    saved = wait(lambda: job.events("saved"), "a save", WAIT_S, job.told)[0]
    evicting.join()
    took = time.time() - warned
    for part in parts:
        assert pods.exit_code(job.name(part)) != 137, job.told()  # left by itself, not killed
        assert "SIGTERM" in pods.logs(job.name(part))
    said = job.end()
    assert saved["images"] < STEPS * BATCH
    assert "head" in parts or "Preempted" in said, said[-3000:]

    job.start()
    said = job.end()
    assert "succeeded" in said.lower(), said[-3000:]
    (resumed,) = job.events("resumed")
    first = next(step for step in job.steps() if step["attempt"] == 2)
    assert resumed["images"] == saved["images"]
    assert first["images"] == saved["images"] + BATCH  # nothing is lost, nothing is done twice
    print(f"eviction to saved: {saved['time'] - warned:.1f} s; to the end of the evicted pods: {took:.1f} s")
    print(f"saved to the next step, in new pods: {first['time'] - saved['time']:.1f} s")

    path = tmp_path / "tiny.yaml"
    path.write_text(dump(cfg))
    undisturbed.run(path, tmp_path / "scratch", 2)
    assert final_losses(cfg) == final_losses(load(path, ["name=undisturbed"]))
    ours, theirs = undisturbed.state(cfg, "tiny"), undisturbed.state(cfg, undisturbed.NAME)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
