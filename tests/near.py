"""An actor's object called directly, as if Ray were around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ray


class Method:
    """`remote` calls at once and returns the result, which `ray.get` of `without_ray` hands on."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class Near:
    """Stands for the handle of an actor. With `dead` set, every call raises as that of a dead one does."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.dead = False

    def __getattr__(self, name: str) -> Method:
        def call(*args: Any) -> Any:
            if self.dead:
                raise ray.exceptions.ActorDiedError
            return getattr(self.actor, name)(*args)

        return Method(call)


def without_ray(monkeypatch: pytest.MonkeyPatch, node: str = "home") -> None:
    """Let `ray.get` hand on what it is given, and this process be on `node`."""

    class Context:
        def get_node_id(self) -> str:
            return node

    monkeypatch.setattr(ray, "get", lambda found, timeout=None: found)
    monkeypatch.setattr(ray, "get_runtime_context", Context)
