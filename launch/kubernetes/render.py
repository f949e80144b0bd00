"""A run's objects: config map, service account without rights, and the RayJob (or a RayCluster to work in). Pure."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field
from typing import Any

import yaml
from kubernetes.client import ApiClient
from kubernetes.client import models as k8s

from diffussm.config.plan import layout
from diffussm.config.schema import Config
from diffussm.errors import ConfigError
from launch.kubernetes import pods
from launch.kubernetes.grace import Grace
from launch.kubernetes.names import INTERACTIVE_LABEL, labels, object_name
from launch.kubernetes.places import read_by_job, unseen, unwritable
from launch.target import Submission

RAY_API = "ray.io/v1"
RAY_VERSION = "2.60.0"
QUEUE_LABEL, PRIORITY_LABEL = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"


@dataclass(frozen=True)
class HeadGroup:
    """KubeRay's headGroupSpec."""

    template: k8s.V1PodTemplateSpec
    rayStartParams: dict[str, str]


@dataclass(frozen=True)
class WorkerGroup:
    """KubeRay's workerGroupSpecs[]; as many pods as nodes, no more and no fewer."""

    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int
    template: k8s.V1PodTemplateSpec
    rayStartParams: dict[str, str]


@dataclass(frozen=True)
class ClusterSpec:
    """KubeRay's RayClusterSpec, as far as we set it."""

    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]
    rayVersion: str = RAY_VERSION
    authOptions: dict[str, str] = field(default_factory=lambda: {"mode": "token"})


@dataclass(frozen=True)
class JobSpec:
    """KubeRay's RayJobSpec, as far as we set it."""

    entrypoint: str
    rayClusterSpec: ClusterSpec
    backoffLimit: int
    submitterPodTemplate: k8s.V1PodTemplateSpec
    submitterConfig: dict[str, int]
    ttlSecondsAfterFinished: int
    submissionMode: str = "K8sJobMode"
    shutdownAfterJobFinishes: bool = True
    suspend: bool = False
    activeDeadlineSeconds: int | None = None


def objects(submission: Submission, grace: Grace) -> list[dict[str, Any]]:
    """Everything to be created as plain data; the last one, the RayJob or the RayCluster to work in, owns the others.

    Args:
        submission: a checked config on its way.
        grace: how long pods may take to leave.

    Raises:
        ConfigError: the config cannot run in pods.
    """
    cfg = submission.cfg
    if submission.variants:
        raise ConfigError("--sweep: found with --to kubernetes; allowed: --to slurm", "submit its runs one at a time")
    check(cfg)
    made: list[Any] = [_config_map(submission)]
    if not cfg.kubernetes.service_account:
        made.append(_service_account(cfg))
    made.append(ray_cluster(cfg, grace) if submission.interactive else ray_job(cfg, grace))
    return [_plain(each) for each in made]


def check(cfg: Config) -> None:
    """Raise ConfigError for what a pod could not do: no image, or places that no pod sees."""
    kube = cfg.kubernetes
    problems = []
    if not kube.image.strip():
        problems.append("kubernetes.image: found none; allowed: an image built from cluster/Dockerfile")
    problems += [*unseen(cfg, read_by_job(cfg)), *unwritable(cfg)]
    try:
        layout(cfg)
    except ConfigError as error:
        problems.append(error.message)
    if problems:
        raise ConfigError("\n".join(problems), "`diffussm config` explains each key")


def ray_job(cfg: Config, grace: Grace) -> dict[str, Any]:
    """The RayJob. Each of its retries is a new cluster, which goes on from the newest checkpoint in the store."""
    kube = cfg.kubernetes
    spec = JobSpec(
        entrypoint=entrypoint(),
        rayClusterSpec=cluster_spec(cfg, grace),
        backoffLimit=kube.retries,
        submitterPodTemplate=pods.submitter(cfg),
        submitterConfig={"backoffLimit": kube.submitter_retries},
        ttlSecondsAfterFinished=kube.keep_finished_s,
        suspend=bool(kube.queue),  # Kueue lets it go when there is room for all of it
        activeDeadlineSeconds=kube.deadline_s or None,
    )
    return _ray("RayJob", cfg, spec)


def ray_cluster(cfg: Config, grace: Grace) -> dict[str, Any]:
    """The same cluster without a job, to work in; it stays until it is deleted."""
    made = _ray("RayCluster", cfg, cluster_spec(cfg, grace))
    made["metadata"].labels[INTERACTIVE_LABEL] = "true"
    return made


def entrypoint() -> str:
    """The command line of the job, quoted: KubeRay hands it to a shell on the head."""
    return shlex.join(["python", "-P", "-m", "cluster.driver", pods.CONFIG_FILE, "cluster.address=auto"])


def cluster_spec(cfg: Config, grace: Grace) -> ClusterSpec:
    """A head without ranks, and one pod for each node."""
    nodes, ranks = layout(cfg)
    gpus = math.ceil(ranks * cfg.cluster.gpus_per_worker)
    head = {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"}  # noqa: S104 - inside the pod's network
    object_store = {"object-store-memory": "104857600"}  # no data travels through Ray
    # No more than the ranks take, or Ray would put the next node's ranks here too; the pod has one more for Ray itself.
    worker = {"num-cpus": f"{math.ceil(ranks * cfg.cluster.cpus_per_worker)}", "num-gpus": f"{gpus}"}
    return ClusterSpec(
        headGroupSpec=HeadGroup(pods.head(cfg, grace), head | object_store),
        workerGroupSpecs=[
            WorkerGroup("nodes", nodes, nodes, nodes, pods.worker(cfg, grace, ranks), worker | object_store)
        ],
    )


def to_yaml(made: list[dict[str, Any]], grace: Grace) -> str:
    """The objects as one YAML stream, with a word on the grace; the same for the same objects."""
    head = (
        "# Rendered by diffussm. Grace of a pod that must go: "
        f"save {grace.save_s:g} s < drain {grace.drain_s} s < pod {grace.pod_s} s.\n"
    )
    return head + yaml.dump_all(made, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Text of several lines stays readable."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _config_map(submission: Submission) -> k8s.V1ConfigMap:
    cfg = submission.cfg
    name = pods.CONFIG_FILE.rpartition("/")[2]
    return k8s.V1ConfigMap(api_version="v1", kind="ConfigMap", metadata=_metadata(cfg), data={name: submission.config})


def _service_account(cfg: Config) -> k8s.V1ServiceAccount:
    """An account of the run's own, bound to no role."""
    return k8s.V1ServiceAccount(
        api_version="v1", kind="ServiceAccount", metadata=_metadata(cfg), automount_service_account_token=False
    )


def _ray(kind: str, cfg: Config, spec: JobSpec | ClusterSpec) -> dict[str, Any]:
    metadata = _metadata(cfg)
    kube = cfg.kubernetes
    queue = {QUEUE_LABEL: kube.queue, PRIORITY_LABEL: kube.priority_class}
    metadata.labels |= {label: value for label, value in queue.items() if value}
    return {"apiVersion": RAY_API, "kind": kind, "metadata": metadata, "spec": spec}


def _metadata(cfg: Config) -> k8s.V1ObjectMeta:
    return k8s.V1ObjectMeta(
        name=object_name(cfg.name), namespace=cfg.kubernetes.namespace, labels=labels(cfg.name),
        annotations={"diffussm.io/root": f"{cfg.storage.rstrip('/')}/{cfg.name}"},
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """Typed objects as the API takes them: the client's own by its serialiser, ours field by field; no nulls."""
    if isinstance(value, HeadGroup | WorkerGroup | ClusterSpec | JobSpec):
        value = {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return ApiClient().sanitize_for_serialization(value)
