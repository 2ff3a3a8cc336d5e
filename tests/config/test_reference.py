"""docs/config.md lists every config key."""

from __future__ import annotations

from scripts.config_reference import OUTPUT, field_descriptions, render, schemas, section_prefixes
from vz_ray.config.load import list_keys


def test_reference_page_is_current():
    assert OUTPUT.read_text(encoding="utf-8") == render(), "run python scripts/config_reference.py"


def test_every_key_has_a_description():
    for schema in (*schemas().values(), *section_prefixes()):
        missing = {key.partition(".")[0] for key in list_keys(schema)} - set(field_descriptions(schema))
        assert not missing, f"{schema.__name__}: {missing}"
