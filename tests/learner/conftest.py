"""Fixtures of the learner's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.learner.rank_worker import small_training_data
from tests.learner.training_data import TrainingData, small_model
from vz_ray.families import FAMILIES
from vz_ray.learner import train_engine


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserve 4 MB instead of 2 GB of address space per trainer; a process with more than the memory cannot fork."""
    monkeypatch.setattr(train_engine, "REDUCE_BUCKET_ELEMENTS", 1_000_000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL checkpoint with random weights."""
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=FAMILIES)
def family_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of each family with random weights."""
    return small_model(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def data(model: Path) -> TrainingData:
    """Groups of trajectories for `model`, with their pixels."""
    return small_training_data(model)
