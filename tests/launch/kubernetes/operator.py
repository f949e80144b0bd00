"""What KubeRay 1.7 makes of a RayJob's templates, as far as it matters to a process inside: a STAND-IN for it.

From its source (ray-operator/controllers/ray/common/pod.go and job.go): the `ray start` line from rayStartParams, given
in a variable because the templates keep their own command; token authentication; the submitter's command.
"""

from __future__ import annotations

import copy
from typing import Any

HEAD_PORT, DASHBOARD_PORT = 6379, 8265
TOKEN_KEY = "auth_token"  # noqa: S105 - the key of the secret that the operator makes, named like the cluster


def start_line(kind: str, params: dict[str, str], memory: str, head: str) -> str:
    """The `ray start` line; the order and the added options are the operator's."""
    every = dict(params) | {
        "metrics-export-port": "8080",
        "block": "true",
        "dashboard-agent-listen-port": "52365",
        "memory": memory,
    }
    if kind == "worker":
        every["address"] = f"{head}:{HEAD_PORT}"
    words = [f" --{key} " if value == "true" else f" --{key}={value} " for key, value in sorted(every.items())]
    return ("ray start --head " if kind == "head" else "ray start ") + "".join(words)


def pod(cluster: dict[str, Any], kind: str, name: str, head: str, memory: str, secret: str) -> dict[str, Any]:
    """The Pod `name` of a RayClusterSpec's head or its only worker group.

    Args:
        cluster: RayClusterSpec as plain data.
        kind: head or worker.
        name: of the pod.
        head: address of the head.
        memory: bytes that Ray is told; the operator takes the container's limit.
        secret: name of the secret with the token.
    """
    group = cluster["headGroupSpec"] if kind == "head" else cluster["workerGroupSpecs"][0]
    made = copy.deepcopy(group["template"])
    container = made["spec"]["containers"][0]
    assert made["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    address = "127.0.0.1" if kind == "head" else head
    container["env"] += [
        {"name": "KUBERAY_GEN_RAY_START_CMD", "value": start_line(kind, group["rayStartParams"], memory, head)},
        {"name": "RAY_PORT", "value": f"{HEAD_PORT}"},
        {"name": "RAY_ADDRESS", "value": f"{address}:{HEAD_PORT}"},
        {"name": "RAY_USAGE_STATS_KUBERAY_IN_USE", "value": "1"},
        *token(secret),
    ]
    if kind == "worker":
        container["env"] += [{"name": "FQ_RAY_IP", "value": head}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": made["metadata"] | {"name": name},
        "spec": made["spec"] | {"restartPolicy": "Never"},
    }


def submitter(job: dict[str, Any], name: str, head: str, secret: str, number: str) -> dict[str, Any]:
    """The pod that hands the entry point to the head and repeats its output; `number` is the submission's id."""
    made = copy.deepcopy(job["submitterPodTemplate"])
    container = made["spec"]["containers"][0]
    address = f"http://{head}:{DASHBOARD_PORT}"
    health = (
        f"import urllib.request as u; exit(b'success' not in u.urlopen('{address}/api/gcs_healthz', timeout=5).read())"
    )
    line = (
        f'until python -c "{health}" >/dev/null 2>&1 ; do echo waiting ; sleep 2 ; done ; '
        f"if ! ray job status --address {address} {number} >/dev/null 2>&1 ; then "
        f"ray job submit --address {address} --no-wait --submission-id {number} -- {job['entrypoint']} ; fi ; "
        f"ray job logs --address {address} --follow {number}"
    )
    container["command"], container["args"] = ["/bin/bash", "-ce", "--"], [line]
    container["env"] += [
        {"name": "RAY_DASHBOARD_ADDRESS", "value": address},
        {"name": "RAY_JOB_SUBMISSION_ID", "value": number},
        *token(secret),
    ]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": made["metadata"] | {"name": name}, "spec": made["spec"]}


def token(secret: str) -> list[dict[str, Any]]:
    """Variables of token authentication, by reference."""
    reference = {"secretKeyRef": {"name": secret, "key": TOKEN_KEY}}
    return [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": reference}]
