"""Typed configuration: one file of dataclasses per room.

In: YAML files and `section.key=value` overrides. Out: frozen dataclasses with
checked values, or one line that says what is wrong and where. Must not know:
torch, Ray, vLLM, or any room but `observe`.
"""

from vz_ray.config.load import ConfigError, load_config, to_yaml

__all__ = ["ConfigError", "load_config", "to_yaml"]
