"""Runs on a Kubernetes cluster through the official client: submit, look, stop, logs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from diffussm.errors import ConfigError, MissingError, UsageError
from launch.kubernetes import render, schema
from launch.kubernetes.grace import grace
from launch.kubernetes.names import MANAGED_LABEL, MANAGER, RUN_LABEL
from launch.target import Job, Submission

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
DEFINITION = f"{PLURAL}.{GROUP}"
OVER = ("Complete", "Failed", "ValidationFailed")
"""jobDeploymentStatus values after which nothing happens any more."""
UNREACHABLE = "kubectl get rayjobs, with the same context, shows whether the cluster can be reached"


class Kubernetes:
    """The cluster of the current context, or the one whose pod this runs in."""

    name = "kubernetes"

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._api: client.ApiClient | None = None

    def render(self, submission: Submission) -> str:
        """All objects as YAML, the same for the same submission."""
        given = grace(submission.measured_save_s)
        return render.to_yaml(render.objects(submission, given), given)

    def submit(self, submission: Submission) -> str:
        """Check against the cluster's own schema, then create; returns the RayJob's name.

        Either everything is created or nothing remains of it.

        Raises:
            ConfigError: the config cannot run in pods, or the cluster's schema refuses the object.
            UsageError: a job of that name is there already.
            MissingError: no cluster, no KubeRay, or no right to do this.
        """
        made = render.objects(submission, grace(submission.measured_save_s))
        job = made[-1]
        self._check_schema(job)
        name: str = job["metadata"]["name"]
        with_job: list[dict[str, Any]] = []
        try:
            for each in [job, *made[:-1]]:  # the RayJob first: it decides who comes first, and it owns the others
                if with_job:
                    each["metadata"]["ownerReferences"] = [_owner(with_job[0])]
                with_job.append(self._create(each))
        except (ApiException, HTTPError) as error:
            if with_job:
                self._custom.delete_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name)
            raise self._ours(error, f"job {name}") from error
        return name

    def jobs(self, run: str = "") -> list[Job]:
        """RayJobs of one run, or all of ours, those alive first."""
        selector = f"{MANAGED_LABEL}={MANAGER}" + (f",{RUN_LABEL}={run}" if run else "")
        try:
            found = self._custom.list_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, label_selector=selector
            )["items"]
        except (ApiException, HTTPError) as error:
            raise self._ours(error, "jobs") from error
        return sorted((job_of(each) for each in found), key=lambda job: (not job.alive, job.run))

    def stop(self, job: Job, now: bool) -> str:
        """Suspend the job, so that its pods save and leave, or with `now` delete it."""
        try:
            if now:
                self._custom.delete_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, job.id)
                return f"{job.run}: deleted"
            self._custom.patch_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, job.id, {"spec": {"suspend": True}}
            )
        except (ApiException, HTTPError) as error:
            raise self._ours(error, f"job {job.id}") from error
        return f"{job.run}: suspended; its pods save and leave"

    def follow(self, job: Job, timeout_s: int) -> Iterator[Job]:
        """The job each time its state changes, until it is over or `timeout_s` have passed."""
        watching = watch.Watch()
        seen = ""
        try:
            for event in watching.stream(
                self._custom.list_namespaced_custom_object, GROUP, VERSION, self.namespace, PLURAL,
                field_selector=f"metadata.name={job.id}", timeout_seconds=timeout_s,
            ):  # fmt: skip
                now = job_of(event["object"])
                if now.state != seen:
                    seen = now.state
                    yield now
                if not now.alive:
                    return
        except (ApiException, HTTPError) as error:
            raise self._ours(error, f"job {job.id}") from error
        finally:
            watching.stop()

    def logs(self, job: Job, lines: int) -> Iterator[str]:
        """The last lines of the driver: of the pod that handed it to the cluster, which repeats its output."""
        core = client.CoreV1Api(self._client)
        try:
            found = core.list_namespaced_pod(self.namespace, label_selector=f"job-name={job.id}").items
            for pod in sorted(found, key=lambda each: each.metadata.creation_timestamp)[-1:]:
                answer = core.read_namespaced_pod_log(
                    pod.metadata.name, self.namespace, tail_lines=lines, _preload_content=False
                )
                yield from answer.data.decode(errors="replace").splitlines()
        except (ApiException, HTTPError) as error:
            raise self._ours(error, f"logs of {job.id}") from error

    @property
    def _client(self) -> client.ApiClient:
        if self._api is None:
            try:
                if os.environ.get("KUBECONFIG") or "KUBERNETES_SERVICE_HOST" not in os.environ:
                    config.load_kube_config(config_file=os.environ.get("KUBECONFIG") or None)
                else:
                    config.load_incluster_config()
            except config.ConfigException as error:
                raise MissingError(
                    f"kubernetes: no cluster is configured ({error})", "set KUBECONFIG, or run inside a pod"
                ) from error
            self._api = client.ApiClient()
        return self._api

    @property
    def _custom(self) -> client.CustomObjectsApi:
        return client.CustomObjectsApi(self._client)

    def _create(self, made: dict[str, Any]) -> dict[str, Any]:
        core = client.CoreV1Api(self._client)
        strict = {"field_validation": "Strict"}
        match made["kind"]:
            case "ConfigMap":
                core.create_namespaced_config_map(self.namespace, made, **strict)
                return made
            case "ServiceAccount":
                core.create_namespaced_service_account(self.namespace, made, **strict)
                return made
        created: dict[str, Any] = self._custom.create_namespaced_custom_object(
            GROUP, VERSION, self.namespace, PLURAL, made, **strict
        )
        return created

    def _check_schema(self, job: dict[str, Any]) -> None:
        """Against the definition that the cluster itself has. Who may not read it leaves this to the server."""
        try:
            answer = client.ApiextensionsV1Api(self._client).read_custom_resource_definition(
                DEFINITION, _preload_content=False
            )
        except ApiException as error:
            if error.status == 403:
                return
            raise self._ours(error, DEFINITION) from error
        except HTTPError as error:
            raise self._ours(error, DEFINITION) from error
        wrong = schema.errors(json.loads(answer.data), job)
        if wrong:
            raise ConfigError(
                "kubernetes: the cluster's KubeRay refuses the job: " + "; ".join(wrong[:5]),
                "this version renders for KubeRay 1.7: upgrade the operator",
            )

    def _ours(self, error: ApiException | HTTPError, what: str) -> Exception:
        if not isinstance(error, ApiException):
            return MissingError(f"kubernetes: the cluster cannot be reached ({error})", UNREACHABLE)
        match error.status:
            case 409:
                return UsageError(f"kubernetes: {what} is there already", "diffussm stop it, or choose another name")
            case 403:
                return MissingError(
                    f"kubernetes: no right to do this with {what} in namespace {self.namespace}",
                    "ask for create, get, list, watch, patch and delete of rayjobs, config maps and service accounts",
                )
            case 404:
                return MissingError(f"kubernetes: {what} is not there", "install KubeRay, or name another namespace")
        return MissingError(f"kubernetes: {what}: {error.status} {error.reason}", UNREACHABLE)


def job_of(made: dict[str, Any]) -> Job:
    """A RayJob as the verbs of the command line see it. Pure."""
    status, labels = made.get("status", {}), made["metadata"].get("labels", {})
    state = status.get("jobDeploymentStatus") or "Created"
    if made.get("spec", {}).get("suspend") and state in ("Created", "Suspended"):
        state = "Suspended"
    return Job(
        id=made["metadata"]["name"],
        run=labels.get(RUN_LABEL, made["metadata"]["name"]),
        state=state,
        alive=state not in OVER,
        where=status.get("message", "") or status.get("rayClusterName", ""),
        restarts=int(status.get("failed", 0)),
        root=made["metadata"].get("annotations", {}).get("diffussm.io/root", ""),
        log="",
    )


def _owner(job: dict[str, Any]) -> dict[str, Any]:
    meta = job["metadata"]
    return {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": meta["name"], "uid": meta["uid"]}
