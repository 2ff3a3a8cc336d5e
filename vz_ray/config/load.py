"""Load a typed config from YAML files and overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from vz_ray.config.fields import FOLLOWS, SOURCE, InvalidValueError
from vz_ray.utils.errors import UserError
from vz_ray.utils.resources import find_resource

C = TypeVar("C")
EXTENDS = "extends"
"""Key of a config file that names the file it extends, relative to itself."""


class ConfigError(UserError):
    """A config file or an override is invalid. The message names the key, its file and line, and the fix."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """Values of one file or one override; later layers override earlier ones.

    Attributes:
        values: As written.
        origin: File name, or the override.
        lines: Line number in the file by dotted key.
    """

    values: DictConfig
    origin: str
    lines: dict[str, int]

    def location(self, key: str) -> str:
        """File and line of `key`, for example `conf/a.yaml:3`."""
        line = self.lines.get(key.replace("[", ".").replace("]", ""))
        return f"{self.origin}:{line}" if line else self.origin


def load_config(schema: type[C], path: Path | str | None = None, overrides: Sequence[str] = ()) -> C:
    """Merge the defaults of `schema`, the file at `path` and `overrides`, in this order.

    A file may extend another one: `extends: quickstart.yaml`, relative to itself.

    Args:
        schema: A dataclass; its `__post_init__` checks values.
        path: YAML file; optional. `conf/...` also finds the files that ship with vz_ray.
        overrides: `section.key=value` with a YAML value.

    Raises:
        ConfigError: Unknown key, wrong type, invalid or missing value, unreadable file.

    Example:
        load_config(GrpoRunConfig, "conf/laptop.yaml", ["train.max_steps=3"])
    """
    layers = [
        *(_file_layers(find_resource(path), ()) if path is not None else ()),
        *map(_override_layer, overrides),
    ]
    config = OmegaConf.structured(schema)
    for layer in layers:
        _check_sections(config, layer.values, layer, "")
        try:
            config = OmegaConf.merge(config, layer.values)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise _merge_error(error, layer, schema) from error
    return _build(schema, config, layers)


def sets_section(path: Path | str, overrides: Sequence[str], section: str) -> bool:
    """Return whether a config file, a file that it extends, or an override sets keys of a top-level section.

    Raises:
        ConfigError: Unreadable file or malformed override.
    """
    layers = [*_file_layers(find_resource(path), ()), *map(_override_layer, overrides)]
    return any(section in layer.values for layer in layers)


def is_config_file(argument: str) -> bool:
    """Return whether a command line argument is a config file, rather than an override."""
    return argument.endswith((".yaml", ".yml")) and "=" not in argument


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the config file, if any, and the overrides.

    Raises:
        UserError: There are several config files.
    """
    files = [argument for argument in arguments if is_config_file(argument)]
    if len(files) > 1:
        raise UserError(f"got {len(files)} config files, {' and '.join(files)}; give one, which may extend another")
    return (files[0] if files else None), [argument for argument in arguments if argument not in files]


def restore_config(schema: type[C], values: dict[str, Any]) -> C:
    """Return the config for the `dataclasses.asdict` output `values`, including derived fields.

    Raises:
        ConfigError: `values` has unknown keys or invalid values.
    """
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), _without_derived(schema, values))
        section = OmegaConf.to_object(config)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"invalid {schema.__name__}: {_first_line(error)}") from error
    assert isinstance(section, schema)
    _restore_derived(section, values)
    return section


def to_yaml(config: object) -> str:
    """Return the config, including defaults and without derived fields, as YAML for `load_config`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def list_keys(schema: type) -> list[str]:
    """Return every dotted key of a schema, in order.

    Example: `["seed", "learner.lr", "learner.clip.low"]`
    """
    return list(_walk(OmegaConf.structured(schema), ""))


def _file_layers(path: Path, extended_by: tuple[Path, ...]) -> list[_Layer]:
    """Layers of a file and of the files that it extends, base first."""
    if path.resolve() in extended_by:
        raise ConfigError(f"{path} extends itself through {extended_by[-1]}; remove one `extends`")
    try:
        text = path.read_text(encoding="utf-8")
        values = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
        lines = dict(_line_numbers(yaml.compose(text), ""))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {getattr(error, 'strerror', error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path} contains a {type(values).__name__}; it must contain `key: value` lines")
    base = values.pop(EXTENDS, None)
    base_layers = _file_layers(path.parent / str(base), (*extended_by, path.resolve())) if base else []
    return [*base_layers, _Layer(values, str(path), lines)]


def _override_layer(text: str) -> _Layer:
    key, sign, _ = text.partition("=")
    if not sign or not key:
        raise ConfigError(f"override '{text}': write it as section.key=value")
    try:
        return _Layer(OmegaConf.from_dotlist([text]), f"override '{text}'", {})
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"override '{text}': {_first_line(error)}") from error


def _line_numbers(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _line_numbers(value, f"{name}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix}{index}", value.start_mark.line + 1
            yield from _line_numbers(value, f"{prefix}{index}.")


def _check_sections(config: Any, values: DictConfig, layer: _Layer, prefix: str) -> None:
    """Raise if a section is given a plain value; OmegaConf's own message names no key."""
    for name in map(str, values):
        if not isinstance(config, DictConfig) or name not in config or OmegaConf.is_missing(config, name):
            continue
        section, value, key = config._get_node(name), values._get_node(name), f"{prefix}{name}"
        if isinstance(section, DictConfig) and is_dataclass(OmegaConf.get_type(section)):
            if not isinstance(value, DictConfig):
                keys = ", ".join(map(str, section))
                raise ConfigError(f"{layer.location(key)}: {key} is a section with the keys {keys}")
            _check_sections(section, value, layer, f"{key}.")


def _merge_error(error: Exception, layer: _Layer, schema: type) -> ConfigError:
    """Error for a layer that OmegaConf rejects: an unknown key or a wrong type."""
    key = str(getattr(error, "full_key", "") or "")
    location = layer.location(key)
    if "not in" not in str(error) or not key:
        return ConfigError(f"{location}: {key + ': ' if key else ''}{_first_line(error)}")
    section = getattr(error, "object_type", None)
    section_fields = fields(section) if is_dataclass(section) else ()
    parent, _, name = key.rpartition(".")
    for item in section_fields:
        if item.name == name and SOURCE in item.metadata:
            return ConfigError(f"{location}: {key} follows {item.metadata[FOLLOWS]}; set that instead")
    siblings = [item.name for item in section_fields if SOURCE not in item.metadata]
    sibling_keys = [f"{parent}.{sibling}" if parent else sibling for sibling in siblings]
    closest = _closest_key(key, sibling_keys, list_keys(schema))
    hint = f"did you mean {closest}?" if closest else f"the keys there are {', '.join(siblings)}"
    return ConfigError(f"{location}: unknown key {key}; {hint}")


def _closest_key(key: str, siblings: Sequence[str], all_keys: Sequence[str]) -> str:
    """Most similar sibling of an unknown key, else a key of the same name in another section."""
    similar = difflib.get_close_matches(key, siblings, n=1, cutoff=0.7)
    name = key.rpartition(".")[2]
    namesakes = [other for other in all_keys if other.rpartition(".")[2] == name]
    return next(iter([*similar, *namesakes]), "")


def _build(schema: type[C], config: Any, layers: Sequence[_Layer]) -> C:
    try:
        section = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", "") or "a key"
        raise ConfigError(f"{key} has no value: set {key}=... or add it to the config file") from error
    except InvalidValueError as error:
        raise _value_error(error, _invalid_section(config, ""), layers) from error
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key = str(getattr(error, "full_key", None) or _invalid_section(config, ""))
        raise ConfigError(f"{key}: {_first_line(error)}" if key else _first_line(error)) from error
    assert isinstance(section, schema)
    return section


def _invalid_section(config: DictConfig, prefix: str) -> str:
    """Dotted key of the innermost section with an error in `__post_init__`; empty for the root."""
    for name in map(str, config):
        node = None if OmegaConf.is_missing(config, name) else config._get_node(name)
        if not isinstance(node, DictConfig):
            continue
        if is_dataclass(OmegaConf.get_type(node)):
            try:
                OmegaConf.to_object(node)
            except (ValueError, TypeError):
                return _invalid_section(node, f"{prefix}{name}.") or f"{prefix}{name}"
        elif inner := _invalid_section(node, f"{prefix}{name}."):
            return inner
    return ""


def _value_error(error: InvalidValueError, section: str, layers: Sequence[_Layer]) -> ConfigError:
    """Error with the location of the last layer that sets a key of the broken rule."""
    prefix = f"{section}." if section else ""
    message = f"{prefix}{error}"
    for layer in reversed(layers):
        layer_keys = _leaf_keys(layer.values)
        for key in (error.key, *error.related):
            if any(f"{leaf}.".startswith(f"{prefix}{key}.") for leaf in layer_keys):
                return ConfigError(f"{layer.location(prefix + key)}: {message}")
    return ConfigError(message)


def _leaf_keys(values: DictConfig) -> list[str]:
    """Dotted keys of all leaves, without resolving interpolations."""
    leaves: list[str] = []
    queue = [("", OmegaConf.to_container(values, resolve=False))]
    while queue:
        prefix, node = queue.pop()
        if isinstance(node, dict) and node:
            queue += [(".".join(filter(None, (prefix, str(name)))), child) for name, child in node.items()]
        else:
            leaves.append(prefix)
    return leaves


def _walk(config: DictConfig, prefix: str) -> Iterator[str]:
    for name in map(str, config):
        node = None if OmegaConf.is_missing(config, name) else config._get_node(name)
        if isinstance(node, DictConfig) and is_dataclass(OmegaConf.get_type(node)):
            yield from _walk(node, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _without_derived(schema: type, values: dict[str, Any]) -> dict[str, Any]:
    hints, items = get_type_hints(schema), {item.name: item for item in fields(schema)}
    return {
        name: _without_derived(hints[name], value) if is_dataclass(hints.get(name)) else value
        for name, value in values.items()
        if name not in items or SOURCE not in items[name].metadata
    }


def _restore_derived(section: Any, values: dict[str, Any]) -> None:
    for item in fields(section):
        if item.name not in values:
            continue
        if SOURCE in item.metadata:
            setattr(section, item.name, values[item.name])
        elif is_dataclass(getattr(section, item.name)):
            _restore_derived(getattr(section, item.name), values[item.name])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
