"""Micro-batches built ahead in a thread give the results of those built when needed."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.learner.rank_worker import parameters, small_config
from tests.learner.training_data import TrainingData, make_training_data
from vz_ray.config.loss import LossConfig
from vz_ray.learner.trainer import Trainer
from vz_ray.video.frame import RGB, FrameRef

TIMING = {"seconds", "tokens_per_second", "input_build_seconds", "input_wait_seconds"}


@pytest.fixture(scope="module")
def data(model: Path) -> TrainingData:
    return make_training_data(model, groups=4, samples=4, overview=4, clip=3, sides=(1, 2))


def train(data: TrainingData, prefetch_batches: int, **changes: Any) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Return the metrics of two steps, timing excluded, and the weights after them."""
    trainer = Trainer(small_config(data.model, 0, prefetch_batches=prefetch_batches, **changes))
    steps = [trainer.sft_step(data.trajectories, data.pixels), trainer.grpo_step(data.groups, data.pixels)]
    assert all(step["input_build_seconds"] > 0 for step in steps)
    return [{name: step[name] for name in step.keys() - TIMING} for step in steps], parameters(trainer)


@pytest.mark.parametrize("changes", [{}, {"freeze_vision": True}], ids=["trained-tower", "frozen-tower"])
def test_building_ahead_changes_no_bit(
    data: TrainingData, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of the frozen tower holds a few frames, so that entries are evicted between micro-batches."""
    config = small_config(data.model, 0)
    hidden_size = Trainer(config).policy.hf.config.get_text_config().hidden_size
    original = Trainer._create_feature_cache

    def create_small_cache(self: Trainer, policy: Any) -> Any:
        cache = original(self, policy)
        cache._max_size = 7 * 2 * 4 * hidden_size
        return cache

    monkeypatch.setattr(Trainer, "_create_feature_cache", create_small_cache)
    changes = changes | {"micro_batch_tokens": config.micro_batch_tokens // 3}
    expected_steps, expected_weights = train(data, 0, **changes)
    steps, weights = train(data, 2, **changes)
    assert steps == expected_steps
    assert all(np.array_equal(weights[name], value) for name, value in expected_weights.items())


def test_frame_error_is_raised_by_the_step_and_clears_the_cache(data: TrainingData) -> None:
    config = small_config(data.model, 0, freeze_vision=True, micro_batch_tokens=250, loss=LossConfig(kl_coef=0.0))
    trainer = Trainer(replace(config, prefetch_batches=2))
    calls, threads = [0], set[str]()

    def load(refs: Sequence[FrameRef]) -> Mapping[str, RGB]:
        threads.add(threading.current_thread().name)
        calls[0] += 1
        if calls[0] == 2:
            raise OSError("the frame source is gone") from ConnectionError("reset")
        return data.pixels

    with pytest.raises(OSError, match="the frame source is gone") as caught:
        trainer.sft_step(data.trajectories, load)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert threading.main_thread().name not in threads
    trainer.engine.deepspeed.zero_grad()
    again = trainer.sft_step(data.trajectories, load)
    fresh = Trainer(config).sft_step(data.trajectories, data.pixels)
    assert again["loss"] == fresh["loss"]
