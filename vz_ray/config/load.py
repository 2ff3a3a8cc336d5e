"""From YAML and overrides to a typed config, or one line that says what is wrong and where."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from vz_ray.utils.errors import UserError

C = TypeVar("C")
EXTENDS = "extends"


class ConfigError(UserError):
    """A config file or override is wrong; names the key, where it stands, and the nearest right one."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """Values from one place; later layers win.

    Attributes:
        values: As written.
        origin: File name, or the override as typed.
        lines: Line number in the file by dotted key.
    """

    values: DictConfig
    origin: str
    lines: dict[str, int]

    def place(self, key: str) -> str:
        """Where `key` stands: `conf/a.yaml:3`."""
        line = self.lines.get(key.replace("[", ".").replace("]", ""))
        return f"{self.origin}:{line}" if line else self.origin


def load_config(schema: type[C], path: Path | str | None = None, overrides: Sequence[str] = ()) -> C:
    """Reads `path` over the defaults of `schema`, then `overrides` over both.

    A file may start from another: `extends: quickstart.yaml`, relative to itself.

    Args:
        schema: A dataclass; its `__post_init__` checks values.
        path: YAML file; only defaults without it.
        overrides: `section.key=value`, the value being YAML.

    Raises:
        ConfigError: Unknown key, wrong type or value, missing value, unreadable file.

    Example:
        load(LearnerConfig, "conf/learner.yaml", ["lr=1e-5"])
    """
    layers = [*(_files(Path(path), ()) if path is not None else ()), *map(_override, overrides)]
    config = OmegaConf.structured(schema)
    for layer in layers:
        _check_sections(config, layer.values, layer, "")
        try:
            config = OmegaConf.merge(config, layer.values)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise _explained(error, layer, schema) from error
    return _built(schema, config, layers)


def restore_config(schema: type[C], values: dict[str, Any]) -> C:
    """The config whose `dataclasses.asdict` was `values`.

    Raises:
        ConfigError: They are of another schema, or not allowed.
    """
    try:
        built = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"no {schema.__name__}: {_first_line(error)}") from error
    assert isinstance(built, schema)
    return built


def to_yaml(config: object) -> str:
    """The whole config, defaults included, as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def list_keys(schema: type) -> list[str]:
    """Every dotted key of a schema, in order.

    Example: `["seed", "learner.lr", "learner.clip.low"]`
    """
    return [key for key, _ in _walk(OmegaConf.structured(schema), "")]


def _files(path: Path, above: tuple[Path, ...]) -> list[_Layer]:
    """This file's layer, after those that it extends."""
    if path.resolve() in above:
        raise ConfigError(f"{path}: extends itself by way of {above[-1]}")
    try:
        text = path.read_text(encoding="utf-8")
        values = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
        lines = dict(_lines(yaml.compose(text), ""))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {getattr(error, 'strerror', error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path}: a config is `key: value` lines, not a {type(values).__name__}")
    base = values.pop(EXTENDS, None)
    below = _files(path.parent / str(base), (*above, path.resolve())) if base else []
    return [*below, _Layer(values, str(path), lines)]


def _override(text: str) -> _Layer:
    key, sign, _ = text.partition("=")
    if not sign or not key:
        raise ConfigError(f"override '{text}': write it as section.key=value")
    try:
        return _Layer(OmegaConf.from_dotlist([text]), f"override '{text}'", {})
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"override '{text}': {_first_line(error)}") from error


def _lines(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _lines(value, f"{name}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix}{index}", value.start_mark.line + 1
            yield from _lines(value, f"{prefix}{index}.")


def _check_sections(config: Any, values: DictConfig, layer: _Layer, prefix: str) -> None:
    """A section given a plain value is named here; OmegaConf's own message names no key."""
    for name in map(str, values):
        if not isinstance(config, DictConfig) or name not in config or OmegaConf.is_missing(config, name):
            continue
        ours, theirs, key = config._get_node(name), values._get_node(name), f"{prefix}{name}"
        if isinstance(ours, DictConfig) and is_dataclass(OmegaConf.get_type(ours)):
            if not isinstance(theirs, DictConfig):
                keys = ", ".join(map(str, ours))
                raise ConfigError(f"{layer.place(key)}: {key} is a section with the keys {keys}")
            _check_sections(ours, theirs, layer, f"{key}.")


def _explained(error: Exception, layer: _Layer, schema: type) -> ConfigError:
    key = str(getattr(error, "full_key", "") or "")
    if "not in" not in str(error) or not key:
        return ConfigError(f"{layer.place(key)}: {key + ': ' if key else ''}{_first_line(error)}")
    known = getattr(error, "object_type", None)
    parent = key.rpartition(".")[0]
    siblings = [f.name for f in fields(known)] if is_dataclass(known) else []
    near = _nearest(key, [f"{parent}.{name}" if parent else name for name in siblings], list_keys(schema))
    hint = f"did you mean {near}?" if near else f"the keys there are {', '.join(siblings)}"
    return ConfigError(f"{layer.place(key)}: there is no key {key}; {hint}")


def _nearest(key: str, siblings: Iterable[str], everywhere: Iterable[str]) -> str:
    """The key most like a wrong one: among its siblings, else one of that name elsewhere."""
    found = difflib.get_close_matches(key, list(siblings), n=1, cutoff=0.7)
    name = key.rpartition(".")[2]
    return next(iter([*found, *(other for other in everywhere if other.rpartition(".")[2] == name)]), "")


def _built(schema: type[C], config: Any, layers: Sequence[_Layer]) -> C:
    try:
        built = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", "") or "a key"
        raise ConfigError(f"{key} has no value: give it as {key}=... or in the config file") from error
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise _placed(error, str(getattr(error, "full_key", None) or _refused(config, "")), layers) from error
    assert isinstance(built, schema)
    return built


def _refused(config: DictConfig, prefix: str) -> str:
    """Dotted key of the innermost section whose `__post_init__` refuses it; empty for the root."""
    for name in map(str, config):
        node = None if OmegaConf.is_missing(config, name) else config._get_node(name)
        if isinstance(node, DictConfig) and is_dataclass(OmegaConf.get_type(node)):
            try:
                OmegaConf.to_object(node)
            except (ValueError, TypeError):
                return _refused(node, f"{prefix}{name}.") or f"{prefix}{name}"
    return ""


def _placed(error: Exception, key: str, layers: Sequence[_Layer]) -> ConfigError:
    """Where the refused value stands: the last layer with a key of this section that the message names."""
    message = _first_line(error)
    words = set(re.findall(r"\w+", message))
    for layer in reversed(layers):
        inside = [k for k in _flat(layer.values) if k == key or k.startswith(f"{key}." if key else "")]
        named = [k for k in inside if k.rpartition(".")[2] in words]
        if named:
            # A key that is named in full is meant rather than one of the same last name.
            return ConfigError(f"{layer.place(max(named, key=lambda k: k in message))}: {message}")
        if inside and key:
            return ConfigError(f"{layer.place(key)}: {key}: {message}")
    return ConfigError(f"{key}: {message}" if key else message)


def _flat(values: DictConfig) -> list[str]:
    """Dotted keys of what a layer says, without resolving interpolations."""
    found: list[str] = []
    queue = [("", OmegaConf.to_container(values, resolve=False))]
    while queue:
        prefix, node = queue.pop()
        if isinstance(node, dict):
            queue += [(".".join(filter(None, (prefix, str(name)))), child) for name, child in node.items()]
        else:
            found.append(prefix)
    return found


def _walk(config: DictConfig, prefix: str) -> Iterator[tuple[str, Any]]:
    for name in map(str, config):
        node = None if OmegaConf.is_missing(config, name) else config._get_node(name)
        if isinstance(node, DictConfig) and is_dataclass(OmegaConf.get_type(node)):
            yield from _walk(node, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", node


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
