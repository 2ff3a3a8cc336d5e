"""Fixtures: schedulers on fake workers, and the config of real engines."""

from __future__ import annotations

import pytest

from tests.rollout.fake_workers import start_scheduler
from vz_ray.config.rollout import EngineConfig

__all__ = ["start_scheduler"]


@pytest.fixture(scope="session")
def engine_config() -> EngineConfig:
    return EngineConfig(
        kv_cache_gib=0.25, mm_processor_cache_gib=0.1, max_model_len=1024, max_num_seqs=8, num_threads=1
    )
