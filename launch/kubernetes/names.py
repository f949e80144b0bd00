"""Names that Kubernetes allows, made from names that people give. Pure."""

from __future__ import annotations

import hashlib
import re

GROUP = "diffussm.io"
RUN_LABEL = f"{GROUP}/run"
"""Carries the run's whole name: a label takes what a run name may hold, an object's name does not."""
INTERACTIVE_LABEL = f"{GROUP}/interactive"
"""Marks a RayCluster that was made to work in; those that the operator makes for a RayJob do not have it."""
MANAGED_LABEL = "app.kubernetes.io/managed-by"
MANAGER = "diffussm"
LONGEST = 47
"""KubeRay refuses longer names of a RayJob, because it appends to them."""
_DIGEST = 8


def object_name(run: str) -> str:
    """A DNS-1035 label for a run: equal names give equal labels, different ones different labels.

    A name that had to be changed or cut ends with a part of its digest.
    """
    plain = re.sub(r"[^a-z0-9-]+", "-", run.lower()).strip("-")
    if not plain or not plain[0].isalpha():
        plain = f"run-{plain}".rstrip("-")
    if plain == run and len(plain) <= LONGEST:
        return plain
    digest = hashlib.sha256(run.encode()).hexdigest()[:_DIGEST]
    return f"{plain[: LONGEST - _DIGEST - 1].rstrip('-')}-{digest}"


def labels(run: str) -> dict[str, str]:
    """Labels of every object of a run."""
    return {RUN_LABEL: run, MANAGED_LABEL: MANAGER}
