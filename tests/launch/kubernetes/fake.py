"""A FAKE of the Kubernetes API, because no real API server can run here: strict about KubeRay's schema, else small.

It speaks HTTP to the official client. It stores objects, refuses what the definition does not allow, two of one name,
stale resource versions and preconditions and callers without rights, lists by label, patches, deletes and streams watch
events. It runs no pods and no operator: tests write a job's status as the operator would.
"""

from __future__ import annotations

import json
import queue
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from launch.kubernetes import schema

KINDS = {
    "rayjobs": "RayJob",
    "rayclusters": "RayCluster",
    "configmaps": "ConfigMap",
    "serviceaccounts": "ServiceAccount",
    "pods": "Pod",
}

_UNKNOWN = ("buildDate", "compiler", "gitCommit", "gitTreeState", "goVersion", "platform")
VERSION = dict.fromkeys(_UNKNOWN, "") | {"major": "1", "minor": "0", "gitVersion": "v1.0-fake"}


class FakeApi:
    """State and rules; `serve` puts it on a port."""

    def __init__(self, definitions: dict[str, dict[str, Any]], forbidden: frozenset[str] = frozenset()) -> None:
        self.definitions, self.forbidden = definitions, forbidden
        self.collects_late = False
        self.on_watch: Callable[[], object] | None = None
        """Called once, when a watch has sent what there is."""
        self.objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self._version = 0
        self._watchers: list[tuple[str, queue.Queue[dict[str, Any] | None]]] = []
        self._lock = threading.RLock()

    def put_status(self, name: str, status: dict[str, Any], namespace: str = "default") -> None:
        """What the operator would do."""
        with self._lock:
            made = self.objects["rayjobs", namespace, name]
            made["status"] = made.get("status", {}) | status
            self._changed("rayjobs", "MODIFIED", made)

    def create(self, plural: str, namespace: str, made: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = made["metadata"]["name"]
        with self._lock:
            if f"create {plural}" in self.forbidden:
                return refused(403, "Forbidden", f"cannot create {plural}")
            if (plural, namespace, name) in self.objects:
                return refused(409, "AlreadyExists", f'{plural} "{name}" already exists')
            if plural in self.definitions:
                wrong = schema.errors(self.definitions[plural], made)
                if wrong:
                    return refused(422, "Invalid", "; ".join(wrong))
            made["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": "2026-01-01T00:00:00Z"}
            self.objects[plural, namespace, name] = made
            self._changed(plural, "ADDED", made)
            return 201, made

    def get(self, plural: str, namespace: str, name: str) -> tuple[int, dict[str, Any]]:
        with self._lock:
            made = self.objects.get((plural, namespace, name))
            return (200, made) if made is not None else refused(404, "NotFound", name)

    def patch(self, plural: str, namespace: str, name: str, change: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            made = self.objects.get((plural, namespace, name))
            if made is None:
                return refused(404, "NotFound", name)
            wanted = change.get("metadata", {}).get("resourceVersion")
            if wanted not in (None, made["metadata"]["resourceVersion"]):
                return refused(409, "Conflict", "the object has been modified")
            merge(made, change)
            self._changed(plural, "MODIFIED", made)
            return 200, made

    def delete(
        self, plural: str, namespace: str, name: str, options: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        with self._lock:
            if f"delete {plural}" in self.forbidden:
                return refused(403, "Forbidden", f"cannot delete {plural}")
            made = self.objects.get((plural, namespace, name))
            if made is None:
                return refused(404, "NotFound", name)
            asked = (options or {}).get("preconditions") or {}
            if any(value not in (None, made["metadata"].get(key)) for key, value in asked.items()):
                return refused(409, "Conflict", "the object has been modified")
            del self.objects[plural, namespace, name]
            self._changed(plural, "DELETED", made)
            if not self.collects_late:
                self.collect()
            return 200, {"kind": "Status", "status": "Success"}

    def collect(self) -> None:
        """The garbage collector's part: what belongs to nobody any more is deleted."""
        with self._lock:
            alive = {each["metadata"].get("uid") for each in self.objects.values()}
            for key, each in list(self.objects.items()):
                owners = each["metadata"].get("ownerReferences", [])
                if owners and not any(owner["uid"] in alive for owner in owners):
                    del self.objects[key]

    def delete_collection(self, plural: str, namespace: str, query: dict[str, list[str]]) -> tuple[int, dict[str, Any]]:
        if f"deletecollection {plural}" in self.forbidden:
            return refused(403, "Forbidden", f"cannot deletecollection {plural}")
        for each in self.listed(plural, namespace, query):
            self.delete(plural, namespace, each["metadata"]["name"])
        return 200, {"kind": "Status", "status": "Success"}

    def listed(self, plural: str, namespace: str, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        labels = dict(part.split("=") for part in query.get("labelSelector", [""])[0].split(",") if part)
        fields = dict(part.split("=") for part in query.get("fieldSelector", [""])[0].split(",") if part)
        with self._lock:
            return [
                made
                for (kind, where, name), made in sorted(self.objects.items())
                if (kind, where) == (plural, namespace)
                and labels.items() <= made["metadata"].get("labels", {}).items()
                and fields.get("metadata.name", name) == name
            ]

    @contextmanager
    def watching(self, plural: str) -> Iterator[queue.Queue[dict[str, Any] | None]]:
        events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        with self._lock:
            self._watchers.append((plural, events))
        try:
            yield events
        finally:
            with self._lock:
                self._watchers.remove((plural, events))

    def _changed(self, plural: str, what: str, made: dict[str, Any]) -> None:
        self._version += 1
        made["metadata"]["resourceVersion"] = str(self._version)
        for kind, events in self._watchers:
            if kind == plural:
                events.put({"type": what, "object": json.loads(json.dumps(made))})


def refused(code: int, reason: str, message: str) -> tuple[int, dict[str, Any]]:
    return code, {"kind": "Status", "status": "Failure", "reason": reason, "message": message, "code": code}


def merge(into: dict[str, Any], change: dict[str, Any]) -> None:
    """RFC 7386."""
    for key, value in change.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


@contextmanager
def serve(api: FakeApi, folder: Path) -> Iterator[Path]:
    """The fake on a port of its own; yields a kubeconfig that leads to it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self, code: int, body: dict[str, Any] | bytes) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(body, bytes) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _handle(self) -> None:
            url = urlsplit(self.path)
            query, parts = parse_qs(url.query), url.path.strip("/").split("/")
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            api.requests.append((self.command, url.path))
            if "customresourcedefinitions" in parts:
                if "read definitions" in api.forbidden:
                    self._answer(*refused(403, "Forbidden", "cannot get customresourcedefinitions"))
                elif (plural := parts[-1].partition(".")[0]) in api.definitions:
                    self._answer(200, api.definitions[plural])
                else:
                    self._answer(*refused(404, "NotFound", parts[-1]))
                return
            if parts == ["version"]:
                self._answer(200, VERSION)
                return
            at = parts.index("namespaces")
            namespace, plural, rest = parts[at + 1], parts[at + 2], parts[at + 3 :]
            if self.command == "POST":
                self._answer(*api.create(plural, namespace, body))
            elif self.command == "PATCH":
                self._answer(*api.patch(plural, namespace, rest[0], body))
            elif self.command == "DELETE" and not rest:
                self._answer(*api.delete_collection(plural, namespace, query))
            elif self.command == "DELETE":
                self._answer(*api.delete(plural, namespace, rest[0], body))
            elif rest[1:] == ["log"]:
                self._answer(200, api.logs[rest[0]].encode())
            elif rest:
                self._answer(*api.get(plural, namespace, rest[0]))
            elif query.get("watch") == ["True"] or query.get("watch") == ["true"]:
                self._watch(plural, namespace, query)
            elif f"list {plural}" in api.forbidden:
                self._answer(*refused(403, "Forbidden", f"cannot list {plural}"))
            else:
                items = api.listed(plural, namespace, query)
                self._answer(
                    200, {"kind": f"{KINDS[plural]}List", "metadata": {"resourceVersion": "1"}, "items": items}
                )

        def _watch(self, plural: str, namespace: str, query: dict[str, list[str]]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")  # as real servers do: a client reads event by event
            self.end_headers()
            with api.watching(plural) as events:
                for made in api.listed(plural, namespace, query):
                    events.put({"type": "ADDED", "object": made})
                happens, api.on_watch = api.on_watch, None
                if happens is not None:
                    happens()
                try:
                    while (event := events.get(timeout=float(query["timeoutSeconds"][0]))) is not None:
                        line = json.dumps(event).encode() + b"\n"
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                        self.wfile.flush()
                except queue.Empty:
                    self.wfile.write(b"0\r\n\r\n")
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

        do_GET = do_POST = do_PATCH = do_DELETE = _handle

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    path = folder / "kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "fake",
                "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
                "users": [{"name": "fake", "user": {"token": "t"}}],
                "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
            }
        )
    )
    try:
        yield path
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
