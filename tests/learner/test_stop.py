"""A stop request during a GRPO step: the state before the step is saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.learner.rank_worker import small_config
from tests.learner.test_checkpoint import assert_same_content
from tests.learner.training_data import InMemoryFrameSource, TrainingData
from vz_ray.learner.learner import Learner
from vz_ray.learner.trainer import Trainer
from vz_ray.utils.interrupt import StepStopped


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_step_is_dropped_before_any_micro_batch(data: TrainingData, tmp_path: Path, stage: int) -> None:
    """The step has two updates. A stop after the first one restores weights, moments and step counts."""
    trainer = Trainer(small_config(data.model, stage))
    trainer.grpo_step(data.groups, data.pixels)
    trainer.save_checkpoint(tmp_path / "before")
    rng_state, steps = torch.get_rng_state(), trainer.engine.steps
    updates: list[int] = []

    def stop_at(check: int) -> bool:
        updates.append(trainer.engine.steps - steps)
        return len(updates) == check

    for check in range(1, 100):
        updates.clear()
        try:
            metrics = trainer.grpo_step(data.groups, data.pixels, should_stop=partial(stop_at, check))
        except StepStopped:
            assert torch.equal(torch.get_rng_state(), rng_state)
            trainer.save_checkpoint(tmp_path / str(check))
            assert_same_content(tmp_path / "before", tmp_path / str(check))
            trainer.engine.deepspeed.zero_grad()
        else:
            break
    assert metrics["updates"] == 2
    assert set(updates) == {0, 1}, "checks before and after the first update"
    assert len(updates) == check - 1 > 4


@pytest.mark.usefixtures("ray_session")
async def test_stop_reaches_all_ranks_and_the_state_before_the_step_is_saved(
    data: TrainingData, tmp_path: Path
) -> None:
    """With ZeRO-3, a rank that stopped alone would leave the other in a collective."""
    learner = await Learner.start(small_config(data.model, 3, world_size=2), InMemoryFrameSource(data.pixels))
    try:
        await learner.grpo_step(data.groups)
        await learner.save_checkpoint(tmp_path / "before")
        await learner.request_stop()
        with pytest.raises(StepStopped, match="the step was dropped because a stop was requested"):
            await learner.grpo_step(data.groups)
        await learner.save_checkpoint(tmp_path / "after")
    finally:
        learner.close()
    assert_same_content(tmp_path / "before", tmp_path / "after")
