"""Validation errors of the rollout and weights configs."""

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
        (EngineConfig, {"gpu_memory_utilization": 1.5}, "engine.gpu_memory_utilization=1.5"),
        (EngineConfig, {"tensor_parallel_size": 0}, "engine.tensor_parallel_size=0"),
        (EngineConfig, {"num_threads": -1}, "engine.num_threads=-1"),
        (RolloutConfig, {"num_workers": 0}, "rollout.num_workers=0"),
        (RolloutConfig, {"turn_timeout_s": 0.0}, "rollout.turn_timeout_s=0.0"),
        (RolloutConfig, {"cpus_per_worker": -1.0}, "rollout.cpus_per_worker=-1.0"),
        (WeightsConfig, {"transport": "pigeon"}, "weights.transport is 'pigeon'"),
        (WeightsConfig, {"bucket_mib": 0}, "weights.bucket_mib is 0"),
        (WeightsConfig, {"probe_tolerance": float("nan")}, "weights.probe_tolerance is nan"),
    ],
)
def test_invalid_value_is_named(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_kv_cache_size_may_be_null() -> None:
    assert EngineConfig(kv_cache_gib=None).kv_cache_gib is None
