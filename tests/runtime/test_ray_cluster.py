"""GPU use of a run."""

from __future__ import annotations

import pytest

from vz_ray.config.ray import RayConfig
from vz_ray.runtime.ray_cluster import use_gpus


@pytest.mark.parametrize(("value", "expected"), [("always", True), ("never", False), ("auto", False)])
def test_auto_uses_gpus_of_the_cluster(ray_session, value, expected):
    assert use_gpus(RayConfig(use_gpus=value)) is expected  # the cluster has no GPU


def test_other_value_is_rejected():
    with pytest.raises(ValueError, match=r"use_gpus is 'yes'; it must be one of auto, always, never"):
        RayConfig(use_gpus="yes")
