"""Rules for section `kubernetes`: names as Kubernetes takes them, so that it refuses nothing that was sent. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from diffussm.config.schema_jobs import KubernetesConfig

Rule = tuple[Callable[[Any], bool], str]

_DNS = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}")
_FOLDER = re.compile(r"/[A-Za-z0-9._/-]{1,250}")
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
OWN_FOLDERS = ("/tmp", "/home/ray", "/etc/diffussm", "/dev/shm")  # noqa: S108 - folders inside pods
"""Folders of the pods that we mount ourselves."""

_AT_LEAST_0: Rule = (lambda value: value >= 0, "0 or more")
_BYTES: Rule = (lambda value: value >= 1 << 26, f"{1 << 26} bytes (64 MiB) or more")
_OPTIONAL_NAME: Rule = (
    lambda value: value == "" or bool(_SUBDOMAIN.fullmatch(value)),
    "empty, or a-z, 0-9, '-' and '.'",
)

RANGES: dict[str, Rule] = {
    "kubernetes.namespace": (lambda value: bool(_DNS.fullmatch(value)), "1 to 63 of a-z, 0-9 and '-'"),
    "kubernetes.image": (
        lambda value: value == "" or bool(_IMAGE.fullmatch(value)),
        "an image's name with tag or digest",
    ),
    "kubernetes.service_account": _OPTIONAL_NAME,
    "kubernetes.queue": _OPTIONAL_NAME,
    "kubernetes.priority_class": _OPTIONAL_NAME,
    "kubernetes.gpu_resource": (lambda value: bool(_KEY.fullmatch(value)), "a resource's name such as nvidia.com/gpu"),
    "kubernetes.head_cpus": (lambda value: value >= 1, "1 or more"),
    "kubernetes.head_memory_bytes": _BYTES,
    "kubernetes.worker_memory_bytes": _BYTES,
    "kubernetes.shm_bytes": _BYTES,
    "kubernetes.retries": _AT_LEAST_0,
    "kubernetes.submitter_retries": _AT_LEAST_0,
    "kubernetes.keep_finished_s": _AT_LEAST_0,
    "kubernetes.deadline_s": _AT_LEAST_0,
    "kubernetes.user_id": (lambda value: 1 <= value < 2**31, "a user that is not root: 1 or more"),
}


def problems(cfg: KubernetesConfig) -> Iterator[str]:
    """What in the section does not fit, each with key, found and allowed."""
    for key in ("image_pull_secrets", "env_from_secrets"):
        for name in getattr(cfg, key):
            if not _SUBDOMAIN.fullmatch(name):
                yield f"kubernetes.{key}: found {name!r}; allowed: names of secrets (a-z, 0-9, '-' and '.')"
    for text in cfg.node_selector:
        key, equals, value = text.partition("=")
        if not (equals and _KEY.fullmatch(key) and _VALUE.fullmatch(value)):
            yield f"kubernetes.node_selector: found {text!r}; allowed: KEY=VALUE of a node's label"
    for text in cfg.tolerations:
        what, _, effect = text.partition(":")
        key, _, value = what.partition("=")
        if not (_KEY.fullmatch(key) and _VALUE.fullmatch(value) and effect in EFFECTS):
            yield f"kubernetes.tolerations: found {text!r}; allowed: KEY[=VALUE]:EFFECT, EFFECT of {', '.join(EFFECTS)}"
    for text in cfg.extra_resources:
        key, _, count = text.partition("=")
        if not (_KEY.fullmatch(key) and count.isascii() and count.isdigit()):
            yield f"kubernetes.extra_resources: found {text!r}; allowed: NAME=COUNT, for example rdma/ib=1"
    for text in cfg.claims:
        claim, _, folder = text.partition("=")
        if not (_DNS.fullmatch(claim) and _FOLDER.fullmatch(folder) and ".." not in folder) or folder in OWN_FOLDERS:
            yield f"kubernetes.claims: found {text!r}; allowed: CLAIM=/FOLDER, none of {', '.join(OWN_FOLDERS)}"
    if cfg.shm_bytes >= cfg.worker_memory_bytes or cfg.shm_bytes >= cfg.head_memory_bytes:
        yield (
            f"kubernetes.shm_bytes: found {cfg.shm_bytes}; allowed: less than the pods' memory, which it is part of "
            f"(head_memory_bytes {cfg.head_memory_bytes}, worker_memory_bytes {cfg.worker_memory_bytes})"
        )
