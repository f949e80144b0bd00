"""Runs on a Kubernetes cluster through the official client: submit, look, stop, logs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kubernetes import watch

from diffussm.errors import MissingError, UsageError
from launch.kubernetes import render
from launch.kubernetes.client import ANSWER_S, CONNECT_S, GROUP, PLURALS, VERSION, Client
from launch.kubernetes.grace import grace
from launch.kubernetes.names import INTERACTIVE_LABEL, MANAGED_LABEL, MANAGER, RUN_LABEL
from launch.target import Job, Submission

OVER = ("Complete", "Failed", "ValidationFailed")
"""jobDeploymentStatus values after which nothing happens any more."""
WATCH_S = 60
"""Seconds of one watch of a job."""


class Kubernetes:
    """RayJobs, and RayClusters to work in, of one namespace."""

    name = "kubernetes"

    def __init__(self, namespace: str) -> None:
        self.client = Client(namespace)

    def render(self, submission: Submission) -> str:
        """All objects as YAML, the same for the same submission."""
        given = grace(submission.measured_save_s, submission.planned_save_s)
        return render.to_yaml(render.objects(submission, given), given)

    def submit(self, submission: Submission) -> str:
        """Check against the cluster's own schema, then create; returns the object's name.

        A job of that run that has ended or was stopped is replaced. Either everything is created or nothing remains.

        Raises:
            ConfigError: the config cannot run in pods, or the cluster's schema refuses the object.
            UsageError: a job of that name runs or waits, or is not ours.
            MissingError: no cluster, no KubeRay, or no right to do this.
        """
        made = render.objects(submission, grace(submission.measured_save_s, submission.planned_save_s))
        self.client.check_schema(made[-1])
        for kind in PLURALS:  # a run has one place where it is written: no job beside a cluster to work in
            found = self.client.find(kind, made[-1]["metadata"]["name"])
            if found is not None:
                self.client.replace(_may_go({"kind": kind} | found, submission.cfg.name))
        name = self.client.create(made)
        if not submission.interactive:
            return name
        inside = f"kubectl exec --namespace {self.client.namespace} --stdin --tty service/{name}-head-svc -- bash"
        return f"{name} (work in it: {inside})"

    def jobs(self, run: str = "") -> list[Job]:
        """Jobs and clusters of one run, or all of ours, those alive first."""
        ours = f"{MANAGED_LABEL}={MANAGER}" + (f",{RUN_LABEL}={run}" if run else "")
        found: list[Job] = []
        # An operator's own clusters of a RayJob carry the job's labels, but not this one.
        for kind, selector in (("RayJob", ours), ("RayCluster", f"{ours},{INTERACTIVE_LABEL}=true")):
            with self.client.said(PLURALS[kind]):
                answer = self.client.custom.list_namespaced_custom_object(
                    GROUP, VERSION, self.client.namespace, PLURALS[kind], label_selector=selector
                )
            found += [job_of({"kind": kind} | each) for each in answer["items"]]
        return sorted(found, key=lambda job: (not job.alive, job.run))

    def stop(self, job: Job, now: bool) -> str:
        """Let the pods save and leave, or with `now` kill them.

        A job is suspended; one of a queue is deleted, because Kueue would let it go on, and so is a cluster.
        """
        kind, name = _kind_and_name(job.id)
        found = self.client.find(kind, name)
        if found is None:
            raise MissingError(f"kubernetes: {job.id} is not there", "diffussm list shows what is")
        if now or kind == "RayCluster" or _in_queue(found):
            self.client.delete(kind, name)
            if not now:
                return f"{job.run}: deleted; its pods save and leave"
            with self.client.said(f"pods of {job.run}"):
                self.client.core.delete_collection_namespaced_pod(
                    self.client.namespace, label_selector=f"{RUN_LABEL}={job.run}", grace_period_seconds=0
                )
            return f"{job.run}: deleted, and its pods are killed"
        with self.client.said(f"job {name}"):
            self.client.custom.patch_namespaced_custom_object(
                GROUP, VERSION, self.client.namespace, PLURALS[kind], name, {"spec": {"suspend": True}}
            )
        return f"{job.run}: suspended; its pods save and leave"

    def logs(self, job: Job, lines: int) -> Iterator[str]:
        """The last lines of the driver: of the pod that handed it to the cluster, which repeats its output.

        Raises:
            UsageError: a cluster to work in has no driver of ours.
        """
        for pod in self._started(job)[-1:]:
            yield from self._output(pod, follow=False, tail_lines=lines)

    def stream(self, job: Job, lines: int) -> Iterator[str]:
        """As `logs`, and then what is added, by the job's further attempts too, until it is over.

        A submitter that takes another's place repeats the driver's output from its beginning.

        Raises:
            UsageError: as `logs`.
        """
        shown = set(self._started(job)[:-1])
        tail = {"tail_lines": lines}
        while (pod := self._another(job, shown)) is not None:
            yield from self._output(pod, follow=True, **tail)
            shown.add(pod)
            tail = {}

    def _another(self, job: Job, shown: set[str]) -> str | None:
        """Wait for a submitter that is not one of `shown`; None once the job is over, or gone, without one."""
        kind, name = _kind_and_name(job.id)
        while self.client.find(kind, name) is not None:
            watching = watch.Watch()
            try:
                with self.client.said(f"job {name}"):
                    # Begins with what is; again and again, since a submitter may start between two changes of the job.
                    for event in watching.stream(
                        self.client.custom.list_namespaced_custom_object, GROUP, VERSION, self.client.namespace,
                        PLURALS[kind], field_selector=f"metadata.name={name}", timeout_seconds=WATCH_S,
                        _request_timeout=(CONNECT_S, WATCH_S + ANSWER_S),
                    ):  # fmt: skip
                        new = [pod for pod in self._started(job) if pod not in shown]
                        if new:
                            return new[0]
                        if event["type"] == "DELETED" or not job_of({"kind": kind} | event["object"]).alive:
                            return None
            finally:
                watching.stop()
        return None

    def _started(self, job: Job) -> list[str]:
        """Pods that handed the driver to the cluster and have a log, the newest last."""
        kind, name = _kind_and_name(job.id)
        if kind == "RayCluster":
            raise UsageError(
                f"kubernetes: {job.id} is a cluster to work in and runs no job",
                f"kubectl logs --namespace {self.client.namespace} service/{name}-head-svc shows Ray's own",
            )
        with self.client.said(f"pods of {name}"):
            found = self.client.core.list_namespaced_pod(self.client.namespace, label_selector=f"job-name={name}").items
        found.sort(key=lambda pod: pod.metadata.creation_timestamp)
        return [pod.metadata.name for pod in found if not (pod.status and pod.status.phase == "Pending")]

    def _output(self, pod: str, *, follow: bool, **options: int) -> Iterator[str]:
        """Lines of a pod's log as they come."""
        with self.client.said(f"logs of {pod}"):
            answer = self.client.core.read_namespaced_pod_log(
                pod, self.client.namespace, follow=follow, _preload_content=False,
                _request_timeout=(CONNECT_S, None if follow else ANSWER_S), **options,
            )  # fmt: skip
            rest = b""
            for part in answer.stream():
                *whole, rest = (rest + part).split(b"\n")
                yield from (line.decode(errors="replace") for line in whole)
            if rest:
                yield rest.decode(errors="replace")


def job_of(made: dict[str, Any]) -> Job:
    """A RayJob or RayCluster as the verbs of the command line see it. Pure."""
    status, labels = made.get("status", {}), made["metadata"].get("labels", {})
    name, asked = made["metadata"]["name"], bool(made.get("spec", {}).get("suspend"))
    if made["kind"] == "RayCluster":
        state = "interactive: " + (status.get("state") or "created")
        id, alive = f"raycluster/{name}", True
    else:
        state = status.get("jobDeploymentStatus") or "Created"
        if asked and state in ("Created", "Suspended"):
            state = "Waiting in its queue" if _in_queue(made) else "Suspended"
        elif asked and state in ("Initializing", "Running"):
            state = "Suspending"
        id, alive = name, state not in (*OVER, "Suspended")
    return Job(
        id=id,
        run=labels.get(RUN_LABEL, name),
        state=state,
        alive=alive,
        where=status.get("message", "") or status.get("rayClusterName", ""),
        restarts=int(status.get("failed", 0)),
        root=made["metadata"].get("annotations", {}).get("diffussm.io/root", ""),
        log="",
    )


def _may_go(found: dict[str, Any], run: str) -> dict[str, Any]:
    """The same object, if a new submission of `run` may replace it; raises UsageError if not. Pure."""
    there, labels = job_of(found), found["metadata"].get("labels", {})
    if labels.get(MANAGED_LABEL) != MANAGER or labels.get(RUN_LABEL) != run:
        raise UsageError(f"kubernetes: {there.id} is there already and is not this run's", "choose another name")
    if there.alive:
        raise UsageError(f"{there.line}: is there already", f"stop it first: diffussm stop {run}")
    return found


def _kind_and_name(id: str) -> tuple[str, str]:
    kind, slash, name = id.rpartition("/")
    return ("RayCluster", name) if slash and kind == "raycluster" else ("RayJob", name)


def _in_queue(made: dict[str, Any]) -> bool:
    return render.QUEUE_LABEL in made["metadata"].get("labels", {})
