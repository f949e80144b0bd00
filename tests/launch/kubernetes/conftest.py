"""A cluster for the tests of this folder: a FAKE API server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.kubernetes.target import Kubernetes
from tests.launch.kubernetes import cases, fake

ANY: dict[str, Any] = {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True}


@pytest.fixture
def api() -> fake.FakeApi:
    any_object = {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": ANY}}]}}
    return fake.FakeApi({plural: cases.found(plural) or any_object for plural in ("rayjobs", "rayclusters")})


@pytest.fixture
def cluster(api: fake.FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    with fake.serve(api, tmp_path) as kubeconfig:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        yield Kubernetes("default")
