"""Invalid values of rollout and weight sync configs."""

from __future__ import annotations

from typing import Any

import pytest

from vz_ray.config.rollout import EngineConfig, RolloutConfig, WeightsConfig


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (EngineConfig, {"dtype": "int8"}, "dtype is 'int8'; it must be one of float32"),
        (EngineConfig, {"kv_cache_gib": 0.0}, "kv_cache_gib is 0.0"),
        (EngineConfig, {"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
        (EngineConfig, {"tensor_parallel_size": 0}, "tensor_parallel_size is 0"),
        (EngineConfig, {"num_threads": -1}, "num_threads is -1"),
        (RolloutConfig, {"num_workers": 0}, "num_workers is 0"),
        (RolloutConfig, {"cpus_per_worker": -1.0}, "cpus_per_worker is -1.0"),
        (WeightsConfig, {"transport": "pigeon"}, "transport is 'pigeon'; it must be one of shm, nccl, ipc"),
        (WeightsConfig, {"bucket_mib": 0}, "bucket_mib is 0"),
        (WeightsConfig, {"probe_tolerance": float("nan")}, "probe_tolerance is nan"),
    ],
)
def test_invalid_value_is_rejected(section: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(**values)


def test_null_kv_cache_uses_gpu_memory_utilization() -> None:
    assert EngineConfig(kv_cache_gib=None).kv_cache_gib is None
