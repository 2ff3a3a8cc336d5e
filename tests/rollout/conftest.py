"""Fixtures: schedulers on fake workers, and the config of real engines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from vz_ray.config.rollout import EngineConfig


@pytest_asyncio.fixture
async def start_scheduler() -> AsyncIterator[Any]:
    """See `fake_workers.open_schedulers`."""
    from tests.rollout.fake_workers import open_schedulers  # imports Ray, without which the engine tests run

    async with open_schedulers() as start:
        yield start


@pytest.fixture(scope="session")
def engine_config() -> EngineConfig:
    return EngineConfig(
        kv_cache_gib=0.25, mm_processor_cache_gib=0.1, max_model_len=1024, max_num_seqs=8, num_threads=1
    )
