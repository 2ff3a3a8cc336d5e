"""A family without its rows in the tables of tests, tiny models, configs and docs fails here."""

from __future__ import annotations

from pathlib import Path

from tests.families.hf_configs import _BUILDERS
from tests.planning.pass_memory import WIDE_SHAPES
from tests.planning.test_model_flops import SIZES
from tests.rollout.test_engine_parity import ENGINES
from vz_ray.config.quickstart import FAMILY_FILES
from vz_ray.families import FAMILIES
from vz_ray.needle.tiny_families import TINY_FAMILIES


def test_every_family_has_its_rows() -> None:
    engines = {parameter.values[0][2].family for parameter in ENGINES}
    for rows in (_BUILDERS, WIDE_SHAPES, SIZES, TINY_FAMILIES, FAMILY_FILES, engines):
        assert set(rows) == set(FAMILIES)


def test_every_family_is_documented_with_its_sizes() -> None:
    page = Path("docs/families.md").read_text()
    for family in FAMILIES.values():
        assert f"`{family.model_type}`" in page
        sizes = ", ".join(name.rpartition("-")[2] for name in family.known_shapes)
        assert sizes in page, f"{family.name}: {sizes}"
