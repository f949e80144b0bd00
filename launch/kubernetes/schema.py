"""Hold an object against a CustomResourceDefinition as an API server with strict field validation does. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator

_LEFT_OUT = ("default", "format", "nullable", "description")


def errors(definition: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    """What of `made` the definition does not allow, as `path: reason`; empty if nothing.

    Args:
        definition: a CustomResourceDefinition as plain data.
        made: an object of its kind.

    Its rules in CEL are left to the server, which also applies the operator's own.
    """
    version = str(made["apiVersion"]).rpartition("/")[2]
    schemas = {v["name"]: v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"]}
    if version not in schemas:
        return [f"apiVersion: found {version}; the cluster has {', '.join(schemas)}"]
    schema = closed(schemas[version])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own part
    found = Draft202012Validator(schema).iter_errors(made)
    return sorted(f"{'.'.join(map(str, each.absolute_path))}: {each.message[:200]}" for each in found)


def closed(node: Any) -> Any:
    """A structural schema as JSON Schema that refuses fields it does not name."""
    if not isinstance(node, Mapping):
        return node
    made = {key: value for key, value in node.items() if not key.startswith("x-kubernetes") and key not in _LEFT_OUT}
    if node.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in node:
        made["properties"] = {key: closed(value) for key, value in node["properties"].items()}
    is_open = "additionalProperties" in node or node.get("x-kubernetes-preserve-unknown-fields")
    if not is_open and ("properties" in node or node.get("type") == "object"):
        made["additionalProperties"] = False
    if isinstance(node.get("additionalProperties"), Mapping):
        made["additionalProperties"] = closed(node["additionalProperties"])
    if "items" in node:
        made["items"] = closed(node["items"])
    if node.get("nullable") and "type" in made:
        made["type"] = [made["type"], "null"]
    return made
