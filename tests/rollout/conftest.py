"""Engine config of tests with real engines."""

from __future__ import annotations

import pytest

from vz_ray.config.rollout import EngineConfig


@pytest.fixture(scope="session")
def engine_config() -> EngineConfig:
    return EngineConfig(
        kv_cache_gib=0.25, mm_processor_cache_gib=0.1, max_model_len=1024, max_num_seqs=8, num_threads=1
    )
