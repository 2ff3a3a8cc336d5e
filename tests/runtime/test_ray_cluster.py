"""What the actors of a run are given."""

from __future__ import annotations

import pytest

from vz_ray.config.ray import RayConfig
from vz_ray.runtime.runtime import use_gpus


@pytest.mark.parametrize(("gpus", "given"), [("always", True), ("never", False), ("auto", False)])
def test_whether_engines_get_gpus_can_be_said_and_else_depends_on_the_cluster(ray_session, gpus, given):
    assert use_gpus(RayConfig(use_gpus=gpus)) is given  # this cluster has none


def test_another_word_is_refused():
    with pytest.raises(ValueError, match=r"use_gpus is 'yes'; it must be one of auto, always, never"):
        RayConfig(use_gpus="yes")
