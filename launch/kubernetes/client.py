"""The one connection to a cluster: objects are created, replaced and removed here, and its refusals become ours."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from diffussm.errors import ConfigError, DiffuSSMError, MissingError, UsageError
from launch.kubernetes import schema

GROUP, VERSION = "ray.io", "v1"
PLURALS = {"RayJob": "rayjobs", "RayCluster": "rayclusters"}
UNREACHABLE = "kubectl get rayjobs, with the same context, shows whether the cluster can be reached"
GONE_S = 300.0
"""Longest wait for something that is deleted to be gone; the operator's finalizers come before."""
LOOK_S = 0.5
CONNECT_S, ANSWER_S = 5.0, 30.0
"""Longest waits for each of several attempts to connect and for an answer to begin, unless a call has its own."""


class _Prompt(client.ApiClient):
    """Gives up on a cluster that cannot be reached; by itself the client waits for the network to, for minutes."""

    def request(self, *arguments: Any, _request_timeout: Any = None, **named: Any) -> Any:
        return super().request(*arguments, _request_timeout=_request_timeout or (CONNECT_S, ANSWER_S), **named)


class Client:
    """Objects of one namespace, in the cluster of the current context or the one whose pod this runs in."""

    def __init__(self, namespace: str) -> None:
        """`namespace` may be empty: then it is the one of the context."""
        self._namespace = namespace
        self._api: client.ApiClient | None = None

    @property
    def namespace(self) -> str:
        """Where everything is done."""
        if not self._namespace:
            self._namespace = _namespace_of_context()
        return self._namespace

    @property
    def api(self) -> client.ApiClient:
        """The connection; made when it is first needed. Raises MissingError if no cluster is configured."""
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
            self._api = _Prompt()
        return self._api

    @property
    def custom(self) -> client.CustomObjectsApi:
        """For RayJobs and RayClusters."""
        return client.CustomObjectsApi(self.api)

    @property
    def core(self) -> client.CoreV1Api:
        """For pods, config maps and service accounts."""
        return client.CoreV1Api(self.api)

    @contextmanager
    def said(self, what: str) -> Iterator[None]:
        """Turn what the cluster or the network refuses into our errors.

        Args:
            what: the object or action, for people.

        Raises:
            UsageError: such an object is there already.
            MissingError: no cluster, no such object, or no right.
        """
        try:
            yield
        except (ApiException, HTTPError) as error:
            raise self._ours(error, what) from error

    def answers(self, seconds: float) -> str:
        """The version of the cluster's API, which also lists this namespace's RayJobs.

        Args:
            seconds: longest wait for each of several attempts to connect.

        Raises:
            MissingError: no cluster, no KubeRay, or no right.
        """
        with self.said("its version"):
            version: str = client.VersionApi(self.api).get_code(_request_timeout=seconds).git_version
        with self.said(PLURALS["RayJob"]):
            self.custom.list_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURALS["RayJob"], limit=1, _request_timeout=seconds
            )
        return version

    def find(self, kind: str, name: str) -> dict[str, Any] | None:
        """A RayJob or RayCluster, or None."""
        with self.said(f"{kind} {name}"):
            try:
                found: dict[str, Any] = self.custom.get_namespaced_custom_object(
                    GROUP, VERSION, self.namespace, PLURALS[kind], name
                )
            except ApiException as error:
                if error.status == 404:
                    return None
                raise
        return found

    def delete(self, kind: str, name: str) -> None:
        """A RayJob or RayCluster and all that it owns; pods get their grace."""
        with self.said(f"{kind} {name}"):
            self.custom.delete_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURALS[kind], name)

    def replace(self, old: dict[str, Any]) -> None:
        """Delete this very object, not one that took its name meanwhile, and wait until it is gone."""
        kind, meta = old["kind"], old["metadata"]
        same = client.V1Preconditions(uid=meta["uid"], resource_version=meta["resourceVersion"])
        with self.said(f"{kind} {meta['name']}"):
            self.custom.delete_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURALS[kind], meta["name"],
                body=client.V1DeleteOptions(preconditions=same, propagation_policy="Background"),
            )  # fmt: skip
        deadline = time.monotonic() + GONE_S
        while (found := self.find(kind, meta["name"])) is not None and found["metadata"]["uid"] == meta["uid"]:
            if time.monotonic() > deadline:
                raise MissingError(
                    f"kubernetes: {kind} {meta['name']} was deleted {GONE_S:g} s ago and is still there",
                    "kubectl describe shows which finalizer it waits for",
                )
            time.sleep(LOOK_S)

    def create(self, made: list[dict[str, Any]]) -> str:
        """Create the last object, which then owns the others, and the others; all of them or none.

        Returns:
            The name of the last one.
        """
        *others, first = made
        kind, name = first["kind"], first["metadata"]["name"]
        with self.said(f"{kind} {name}"):
            created: dict[str, Any] = self.custom.create_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURALS[kind], first, field_validation="Strict"
            )
        meta = created["metadata"]
        owner = {"apiVersion": first["apiVersion"], "kind": kind, "name": name, "uid": meta["uid"]}
        try:
            for each in others:
                each["metadata"]["ownerReferences"] = [owner]
                self._create_part(each)
        except BaseException:  # an interrupt too: a job without its config would start and fail
            self.delete(kind, name)
            raise
        return str(name)

    def check_schema(self, made: dict[str, Any]) -> None:
        """Hold an object against the definition that the cluster has; who may not read it leaves this to the server.

        Raises:
            ConfigError: the cluster's KubeRay does not take it.
        """
        definition = f"{PLURALS[made['kind']]}.{GROUP}"
        with self.said(definition):
            try:
                answer = client.ApiextensionsV1Api(self.api).read_custom_resource_definition(
                    definition, _preload_content=False
                )
            except ApiException as error:
                if error.status == 403:
                    return
                raise
        wrong = schema.errors(json.loads(answer.data), made)
        if wrong:
            raise ConfigError(
                "kubernetes: the cluster's KubeRay refuses the job: " + "; ".join(wrong[:5]),
                "this version renders for KubeRay 1.7: upgrade the operator",
            )

    def _create_part(self, made: dict[str, Any]) -> None:
        """A config map or service account; one of the same name that an earlier, deleted job left is waited for."""
        kind, name = made["kind"], made["metadata"]["name"]
        word = {"ConfigMap": "config_map", "ServiceAccount": "service_account"}[kind]
        create = getattr(self.core, f"create_namespaced_{word}")
        read = getattr(self.core, f"read_namespaced_{word}")
        delete = getattr(self.core, f"delete_namespaced_{word}")
        deadline = time.monotonic() + GONE_S
        while True:
            try:
                with self.said(f"{kind} {name}"):
                    create(self.namespace, made, field_validation="Strict")
                return
            except UsageError:
                if time.monotonic() > deadline or not self._is_left_over(read, name):
                    raise
                with self.said(f"{kind} {name}"):
                    _quietly(delete, name, self.namespace)
                time.sleep(LOOK_S)

    def _is_left_over(self, read: Any, name: str) -> bool:
        """Whether an object belongs to a RayJob or RayCluster that is gone: the garbage collector comes late."""
        with self.said(name):
            found = _quietly(read, name, self.namespace)
        if found is None:
            return True
        owners = found.metadata.owner_references or []
        return any(
            owner.kind in PLURALS and (self.find(owner.kind, owner.name) or _NOBODY)["metadata"]["uid"] != owner.uid
            for owner in owners
        )

    def _ours(self, error: ApiException | HTTPError, what: str) -> DiffuSSMError:
        if not isinstance(error, ApiException):
            return MissingError(f"kubernetes: the cluster cannot be reached ({error})", UNREACHABLE)
        match error.status:
            case 409:
                return UsageError(f"kubernetes: {what} is there already", "diffussm stop it, or choose another name")
            case 403:
                return MissingError(
                    f"kubernetes: no right to do this with {what} in namespace {self.namespace}",
                    "ask for the rights that docs/operations.md lists",
                )
            case 404:
                return MissingError(f"kubernetes: {what} is not there", "install KubeRay, or name another namespace")
        return MissingError(f"kubernetes: {what}: {error.status} {error.reason}", UNREACHABLE)


_NOBODY: dict[str, Any] = {"metadata": {"uid": ""}}


def _quietly(call: Any, *arguments: str) -> Any:
    """The call's answer, or None if the object is not there."""
    try:
        return call(*arguments)
    except ApiException as error:
        if error.status == 404:
            return None
        raise


def _namespace_of_context() -> str:
    """The namespace that kubectl would use; in a pod its own."""
    inside = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    try:
        _, active = config.list_kube_config_contexts(os.environ.get("KUBECONFIG") or None)
    except config.ConfigException:
        return inside.read_text().strip() if inside.exists() else "default"
    return str(active["context"].get("namespace") or "default")
