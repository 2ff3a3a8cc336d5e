"""Negative numbers are refused by every config section."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields

import pytest

import vz_ray.config
from vz_ray.config.fields import SOURCE, InvalidValueError, Section

for module in pkgutil.iter_modules(vz_ray.config.__path__):
    importlib.import_module(f"vz_ray.config.{module.name}")


def sections(base: type[Section] = Section) -> list[type[Section]]:
    return [section for child in base.__subclasses__() for section in (child, *sections(child))]


NUMBERS = sorted(
    {
        (section, item.name)
        for section in sections()
        for item in fields(section)
        if item.name in section.__annotations__ and SOURCE not in item.metadata
        if str(item.type).split(" | ")[0] in ("int", "float", "list[int]", "list[float]")
    },
    key=str,
)


@pytest.mark.parametrize(("section", "key"), NUMBERS, ids=[f"{section.__name__}.{key}" for section, key in NUMBERS])
def test_negative_number_is_refused(section, key):
    kind = {item.name: str(item.type) for item in fields(section)}[key]
    with pytest.raises(InvalidValueError, match="-3") as caught:
        section(**{key: [-3] if kind.startswith("list") else -3})
    assert caught.value.key == key
