"""The pods of a run as the official client's typed objects: no privilege, no root, secrets by reference only.

Ray must be process 1 of its container, so that the pod's SIGTERM reaches `ray start --block`, which drains the node;
KubeRay's own command would put a shell there, which a SIGTERM does not pass.
"""

from __future__ import annotations

import math

from kubernetes.client import models as k8s

from diffussm.config.schema import Config
from diffussm.config.schema_jobs import KubernetesConfig
from launch.kubernetes.grace import Grace
from launch.kubernetes.names import labels, object_name

CONFIG_FOLDER = "/etc/diffussm"
CONFIG_FILE = f"{CONFIG_FOLDER}/run.yaml"
SCRATCH = {"tmp": "/tmp", "home": "/home/ray"}  # noqa: S108 - inside the pod, a volume of its own
"""Folders that may be written although the root file system may not."""
METRICS_PORT = 8080
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": METRICS_PORT}
RAY_COMMAND = ["/bin/bash", "-c", "ulimit -n 65536; exec $KUBERAY_GEN_RAY_START_CMD"]
"""KubeRay puts its `ray start` line into this variable when it is asked to leave the container's command alone."""
OWN_COMMAND = {"ray.io/overwrite-container-cmd": "true"}


def head(cfg: Config, grace: Grace) -> k8s.V1PodTemplateSpec:
    """The pod of the head and the driver: no GPU, no ranks."""
    kube = cfg.kubernetes
    sizes = {"cpu": f"{kube.head_cpus:g}", "memory": f"{kube.head_memory_bytes}"}
    container = _ray_container("ray-head", cfg, grace, sizes, PORTS)
    return _template(cfg, container, grace, selector=[], tolerations=[])


def worker(cfg: Config, grace: Grace, ranks: int) -> k8s.V1PodTemplateSpec:
    """The pod of one node with `ranks` ranks, each with its CPUs and GPUs."""
    kube, cluster = cfg.kubernetes, cfg.cluster
    sizes = {"cpu": f"{ranks * cluster.cpus_per_worker + 1:g}", "memory": f"{kube.worker_memory_bytes}"}
    if cluster.gpus_per_worker:
        sizes[kube.gpu_resource] = f"{math.ceil(ranks * cluster.gpus_per_worker)}"
    sizes |= dict(_pairs(kube.extra_resources))
    container = _ray_container("ray-worker", cfg, grace, sizes, {"metrics": METRICS_PORT})
    return _template(cfg, container, grace, selector=kube.node_selector, tolerations=kube.tolerations)


def submitter(cfg: Config) -> k8s.V1PodTemplateSpec:
    """The small pod from which KubeRay hands the entry point to the head; KubeRay gives it its command."""
    container = k8s.V1Container(
        name="ray-job-submitter",
        image=cfg.kubernetes.image,
        resources=_resources({"cpu": "500m", "memory": "512Mi"}),
        security_context=_container_security(cfg.kubernetes),
        volume_mounts=[_mount(name, path) for name, path in SCRATCH.items()],
        env=[k8s.V1EnvVar(name="HOME", value=SCRATCH["home"])],
    )
    volumes = [_scratch(name) for name in SCRATCH]
    spec = _spec(cfg, container, volumes)
    spec.restart_policy = "Never"
    return k8s.V1PodTemplateSpec(metadata=k8s.V1ObjectMeta(labels=labels(cfg.name)), spec=spec)


def _template(
    cfg: Config, container: k8s.V1Container, grace: Grace, *, selector: list[str], tolerations: list[str]
) -> k8s.V1PodTemplateSpec:
    kube = cfg.kubernetes
    volumes = [_scratch(name) for name in SCRATCH]
    volumes.append(k8s.V1Volume(name="config", config_map=k8s.V1ConfigMapVolumeSource(name=_object(cfg))))
    shm = k8s.V1EmptyDirVolumeSource(medium="Memory", size_limit=f"{kube.shm_bytes}")
    volumes.append(k8s.V1Volume(name="shm", empty_dir=shm))
    for claim, _ in _pairs(kube.claims):
        source = k8s.V1PersistentVolumeClaimVolumeSource(claim_name=claim)
        volumes.append(k8s.V1Volume(name=f"claim-{claim}", persistent_volume_claim=source))
    spec = _spec(cfg, container, volumes)
    spec.termination_grace_period_seconds = grace.pod_s
    spec.node_selector = dict(_pairs(selector)) or None
    spec.tolerations = [toleration(text) for text in tolerations] or None
    annotations = OWN_COMMAND | {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": f"{METRICS_PORT}",
        "prometheus.io/path": "/metrics",
    }
    metadata = k8s.V1ObjectMeta(labels=labels(cfg.name), annotations=annotations)
    return k8s.V1PodTemplateSpec(metadata=metadata, spec=spec)


def _spec(cfg: Config, container: k8s.V1Container, volumes: list[k8s.V1Volume]) -> k8s.V1PodSpec:
    kube = cfg.kubernetes
    return k8s.V1PodSpec(
        containers=[container],
        volumes=volumes,
        service_account_name=kube.service_account or _object(cfg),
        automount_service_account_token=False,  # nothing in the pods talks to Kubernetes
        enable_service_links=False,
        image_pull_secrets=[k8s.V1LocalObjectReference(name=name) for name in kube.image_pull_secrets] or None,
        security_context=k8s.V1PodSecurityContext(
            run_as_non_root=True,
            run_as_user=kube.user_id,
            run_as_group=kube.user_id,
            fs_group=kube.user_id,
            seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault"),
        ),
    )


def _ray_container(
    name: str, cfg: Config, grace: Grace, sizes: dict[str, str], ports: dict[str, int]
) -> k8s.V1Container:
    kube = cfg.kubernetes
    values = {
        "HOME": SCRATCH["home"],
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": f"{grace.drain_s}",
        "RAY_JOB_STOP_WAIT_TIME_S": f"{grace.drain_s}",  # KubeRay stops the driver of a job that is deleted
        "TRITON_CACHE_DIR": f"{SCRATCH['tmp']}/triton",
        "TORCH_EXTENSIONS_DIR": f"{SCRATCH['tmp']}/extensions",
    }
    mounts = [_mount(volume, path) for volume, path in SCRATCH.items()]
    mounts.append(k8s.V1VolumeMount(name="config", mount_path=CONFIG_FOLDER, read_only=True))
    mounts.append(_mount("shm", "/dev/shm"))  # noqa: S108 - inside the pod
    mounts += [_mount(f"claim-{claim}", path) for claim, path in _pairs(kube.claims)]
    return k8s.V1Container(
        name=name,
        image=kube.image,
        command=RAY_COMMAND,
        ports=[k8s.V1ContainerPort(name=port, container_port=number) for port, number in ports.items()],
        env=[k8s.V1EnvVar(name=key, value=value) for key, value in values.items()],
        env_from=[
            k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name=secret)) for secret in kube.env_from_secrets
        ]
        or None,
        resources=_resources(sizes),
        security_context=_container_security(kube),
        volume_mounts=mounts,
        lifecycle=k8s.V1Lifecycle(pre_stop=_pre_stop(grace)),
    )


def _pre_stop(grace: Grace) -> k8s.V1LifecycleHandler:
    """Warn Ray at once and wait for the ranks to have left, at most as long as the drain; SIGTERM comes after it.

    Ray's process 1 drains its node on a SIGTERM. Sending it here and waiting keeps the container's other processes
    alive meanwhile, whatever the runtime sends them.
    """
    wait = f"kill -TERM 1; i=0; while [ -d /proc/1 ] && [ $i -lt {grace.drain_s} ]; do sleep 1; i=$((i+1)); done"
    return k8s.V1LifecycleHandler(_exec=k8s.V1ExecAction(command=["/bin/bash", "-c", wait]))


def _container_security(kube: KubernetesConfig) -> k8s.V1SecurityContext:
    return k8s.V1SecurityContext(
        allow_privilege_escalation=False,
        privileged=False,
        read_only_root_filesystem=kube.read_only_root,
        capabilities=k8s.V1Capabilities(drop=["ALL"]),
    )


def _resources(sizes: dict[str, str]) -> k8s.V1ResourceRequirements:
    """Requests equal limits: the pod is guaranteed what it has, and is the last to be evicted."""
    return k8s.V1ResourceRequirements(requests=dict(sizes), limits=dict(sizes))


def toleration(text: str) -> k8s.V1Toleration:
    """`key:Effect` or `key=value:Effect` as kubectl writes taints."""
    what, _, effect = text.partition(":")
    key, equals, value = what.partition("=")
    if equals:
        return k8s.V1Toleration(key=key, operator="Equal", value=value, effect=effect)
    return k8s.V1Toleration(key=key, operator="Exists", effect=effect)


def _pairs(texts: list[str]) -> list[tuple[str, str]]:
    return [(left, right) for left, _, right in (text.partition("=") for text in texts)]


def _object(cfg: Config) -> str:
    return object_name(cfg.name)


def _mount(volume: str, path: str) -> k8s.V1VolumeMount:
    return k8s.V1VolumeMount(name=volume, mount_path=path)


def _scratch(name: str) -> k8s.V1Volume:
    return k8s.V1Volume(name=name, empty_dir=k8s.V1EmptyDirVolumeSource())
