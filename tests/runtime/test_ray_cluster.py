"""GPU use of a run."""

from __future__ import annotations

import pytest
import ray

from vz_ray.config.ray import RayConfig
from vz_ray.runtime.ray_cluster import init_ray, ray_cluster, use_gpus
from vz_ray.utils.errors import UserError

SLOW_START = Exception("The current node timed out during startup. This could happen because some of the raylet failed")


@pytest.mark.parametrize(("value", "expected"), [("always", True), ("never", False), ("auto", False)])
def test_auto_uses_gpus_of_the_cluster(ray_session, value, expected):
    assert use_gpus(RayConfig(use_gpus=value)) is expected  # the cluster has no GPU


def test_other_value_is_rejected():
    with pytest.raises(ValueError, match=r"use_gpus is 'yes'; it must be one of auto, always, never"):
        RayConfig(use_gpus="yes")


def test_slow_start_is_tried_again(monkeypatch):
    results = iter([SLOW_START, None])
    calls = []

    def init(**options):
        calls.append(options)
        if (error := next(results)) is not None:
            raise error

    monkeypatch.setattr(ray, "init", init)
    init_ray(address="local")
    assert calls == [{"address": "local"}] * 2


async def test_start_that_stays_slow_is_an_error_of_one_line(monkeypatch):
    def init(**options):
        raise SLOW_START

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match=r"^cannot start Ray: The current node timed out.*try `vz-ray doctor`$"):
        async with ray_cluster(RayConfig()):
            pass
