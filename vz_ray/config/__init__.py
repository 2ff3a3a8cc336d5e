"""Typed configuration: one dataclass per section, one module per part of the system.

Input: YAML files and `section.key=value` overrides. Output: dataclasses with checked values, or one
`ConfigError` that names the file, line and key. Imports no torch, Ray or vLLM, and of vz_ray only `utils`.
"""

from vz_ray.config.load import ConfigError, load_config, to_yaml

__all__ = ["ConfigError", "load_config", "to_yaml"]
