"""One YAML file plus `key=value` overrides becomes a `Config`, or a ConfigError that says which key is wrong.

Layers, later ones win: defaults of the schema, the file named by `base:` (and its own base), the file, the overrides.
A submitted job has one file alone: its `base:` holds the keys of the outermost base themselves, and that file's name.
An override that names a YAML file lays that file over, so that a cluster or a size can be chosen beside the recipe.
OmegaConf does the merging, the conversion of types and `${...}` interpolation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffussm.config.explain import Key, describe, nearest, table
from diffussm.config.schema import Config
from diffussm.errors import ConfigError


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the config at `path`, apply `overrides`, and return it with every value resolved.

    Args:
        path: a YAML file, or the folder of a run (its `config.yaml` is read).
        overrides: `dotted.key=value`, the value in YAML, for a text key the characters as they stand; or a YAML file
            with some keys, which is laid over what stands before it.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or missing, or a value has the wrong type. Rules that
            join several keys are in `diffussm.config.rules`.
    """
    layers = _read_with_bases(Path(path), [])
    for text in overrides:
        layers += (
            _read_with_bases(Path(text), []) if is_overlay(text) else [(f"override {text!r}", _parse_override(text))]
        )
    return _resolve(_merge(layers), str(path))


def preset(path: str | Path) -> tuple[str, Config] | None:
    """The file at the bottom of the `base:` chain of `path`, and what it says alone; None if it is no recipe.

    A file with every key is none: it was dumped by a run, and nobody chose it.

    Raises:
        ConfigError: a file of the chain cannot be read.
    """
    source, layer = _read_with_bases(Path(path), [])[0]
    if all(_has(layer, key.name) for key in describe()):
        return None
    try:
        return source, _resolve(_merge([(source, layer)]), source)
    except ConfigError:  # a base may leave open what every file on top of it says
        return None


def is_overlay(text: str) -> bool:
    """Whether an override names a file to lay over the config rather than a key and its value."""
    return "=" not in text and text.endswith((".yaml", ".yml"))


def dump(cfg: Config) -> str:
    """The resolved config as YAML; `load` of it gives an equal config."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def digest(cfg: Config) -> str:
    """SHA-256 of the resolved config: equal exactly when all values are equal. 64 hexadecimal digits."""
    return hashlib.sha256(dump(cfg).encode()).hexdigest()


def _merge(layers: Sequence[tuple[str, dict[str, Any]]]) -> DictConfig:
    """The layers on the schema's defaults, later ones win; each with the name of its source."""
    merged = OmegaConf.structured(Config)
    for source, layer in layers:
        _check_layer(layer, source)
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(layer))
        except OmegaConfBaseException as error:
            raise _refusal(error, layer, source) from error
    return cast(DictConfig, merged)


def _resolve(merged: DictConfig, source: str) -> Config:
    """Turn the merged layers into a real `Config`; mandatory keys must be set and interpolations must resolve."""
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if not missing:
            return cast(Config, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or "a value"
        raise ConfigError(f"{source}: {key}: cannot be resolved: {str(error).splitlines()[0]}") from error
    raise ConfigError(
        f"{source}: must be set and are not: {', '.join(missing)}",
        "set them in the file, or on the command line: " + " ".join(f"{key}=..." for key in missing),
    )


def _read_with_bases(path: Path, seen: list[Path]) -> list[tuple[str, dict[str, Any]]]:
    """The file's content after those of its bases, outermost base first, each with the file's name."""
    if path.is_dir():
        path = path / "config.yaml"
    resolved = path.resolve()
    if resolved in seen:
        chain = " -> ".join(str(step) for step in [*seen, resolved])
        raise ConfigError(f"{path}: base: the files name each other in a circle: {chain}", "remove one `base:`")
    content = _read(path)
    base = content.pop("base", None)
    if base is None:
        return [(str(path), content)]
    if isinstance(base, dict):
        source = base.pop("file", None)
        if not isinstance(source, str):
            raise ConfigError(f"{path}: base.file: found {source!r}; allowed: the name of the file that base holds")
        return [(source, base), (str(path), content)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: found {base!r}; allowed: the name of another YAML file, relative to this one")
    return [*_read_with_bases(path.parent / base, [*seen, resolved]), (str(path), content)]


def _read(path: Path) -> dict[str, Any]:
    """The YAML mapping in `path`, interpolations left as they are."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file", "name a YAML file, or a run's folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: found a {type(content).__name__}; allowed: a mapping of keys to values")
    return cast(dict[str, Any], content)


def _parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` as a nested mapping."""
    name, equals, value_text = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(
            f"override {text!r}: has no key and value",
            "write it as key=value, for example train.lr=3e-4, or name a YAML file to lay over",
        )
    value: Any = value_text
    key = table().get(name)
    # YAML would read name=1e5 as a number and name=on as a boolean; text is kept as typed, except for quoted text.
    if key is None or key.kind is not str or value_text[:1] in ("'", '"'):
        try:
            value = OmegaConf.to_container(OmegaConf.create(f"v: {value_text}"))["v"]  # type: ignore[index,call-overload]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"override {text!r}: the value is not valid YAML: {error}") from error
    for part in reversed(name.split(".")):
        value = {part: value}
    return cast(dict[str, Any], value)


def _has(layer: Mapping[str, Any], name: str) -> bool:
    value: Any = layer
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


def _check_layer(layer: Mapping[Any, Any], source: str, prefix: str = "") -> None:
    """Refuse what OmegaConf would take or report badly: unknown keys, sections that are none, numbers for text."""
    keys = table()
    for part, value in layer.items():
        name = f"{prefix}{part}"
        key = keys.get(name)
        if key is None:
            like = nearest(name)
            hint = f"did you mean {like}?" if like else "`diffussm config` lists all keys"
            raise ConfigError(f"{source}: {name}: there is no such key", hint)
        if key.is_section:
            if not isinstance(value, Mapping):
                inside = ", ".join(k for k in keys if k.startswith(name + "."))
                raise ConfigError(f"{source}: {name}: found {value!r}; allowed: a section with the keys {inside}")
            _check_layer(value, source, name + ".")
        elif key.kind is str and value is not None and not isinstance(value, str):
            raise _wrong(key, value, source, "put the value in quotes")
        elif key.kind is list and not _is_list(value, key.item):
            numbers = "write [0.05, 0.1]" if key.item is float else ""
            raise _wrong(key, value, source, numbers or "write [a, b]; put values that look like numbers in quotes")


def _is_list(value: object, item: type) -> bool:
    """Whether `value` is a list of `item`, or an interpolation, which is one string until it is resolved.

    A whole number is a number; a boolean is none.
    """
    if isinstance(value, str):
        return value.startswith("${")
    types = (int, float) if item is float else (item,)
    return isinstance(value, list) and all(isinstance(one, types) and not isinstance(one, bool) for one in value)


def _wrong(key: Key, value: object, source: str, remedy: str = "") -> ConfigError:
    found = "null" if value is None else f"{value!r} ({type(value).__name__})"
    return ConfigError(f"{source}: {key.name}: found {found}; allowed: {key.allowed}", remedy or key.help)


def _refusal(error: OmegaConfBaseException, layer: Mapping[str, Any], source: str) -> ConfigError:
    """OmegaConf's refusal in our words: dotted key, value found, values allowed."""
    name = str(getattr(error, "full_key", None) or "")
    key = table().get(name)
    if key is None:
        return ConfigError(f"{source}: {name or 'the file'}: {str(error).splitlines()[0]}")
    value: Any = layer
    for part in name.split("."):
        value = value[part]
    return _wrong(key, value, source)
