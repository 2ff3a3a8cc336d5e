"""Configs of the fleet and of the weights name the value that is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from vz_ray.config.rollout import EngineConfig, RolloutConfig
from vz_ray.config.weights import WeightsConfig


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (EngineConfig, {"dtype": "int8"}, "engine.dtype='int8'"),
        (EngineConfig, {"kv_cache_gib": 0.0}, "engine.kv_cache_gib=0.0"),
        (EngineConfig, {"gpu_memory": 1.5}, "engine.gpu_memory_utilization=1.5"),
        (EngineConfig, {"tensor_parallel": 0}, "engine.tensor_parallel_size=0"),
        (EngineConfig, {"threads": -1}, "engine.num_threads=-1"),
        (RolloutConfig, {"workers": 0}, "rollout.num_workers=0"),
        (RolloutConfig, {"turn_deadline_s": 0.0}, "rollout.turn_timeout_s=0.0"),
        (RolloutConfig, {"cpus_per_worker": -1.0}, "rollout.cpus_per_worker=-1.0"),
        (WeightsConfig, {"transport": "pigeon"}, "weights.transport is 'pigeon'"),
        (WeightsConfig, {"bucket_mib": 0}, "weights.bucket_mib is 0"),
        (WeightsConfig, {"probe_tolerance": float("nan")}, "weights.probe_tolerance is nan"),
    ],
)
def test_a_wrong_value_is_named(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_null_lets_the_engine_take_its_share_of_the_device() -> None:
    assert EngineConfig(kv_cache_gib=None).kv_cache_gib is None
