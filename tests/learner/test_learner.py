"""The learner as Ray actors: two real ranks, frames from a source, deaths that are named."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from tests.learner.rank_worker import small_config, small_training_data
from tests.learner.training_data import (
    ChangedFrameSource,
    HangingFrameSource,
    InMemoryFrameSource,
    TrainingData,
    small_model,
)
from vz_ray.env.trajectory import Group
from vz_ray.learner.learner import Learner, LearnerDiedError
from vz_ray.learner.learner_actor import CachedFrameLoader
from vz_ray.learner.weight_transports import LearnerShmTransport
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.utils.errors import UserError
from vz_ray.utils.timeouts import StepTimeout
from vz_ray.weight_sync.weight_store import read_manifest, read_tensors


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return small_training_data(small_model(tmp_path_factory.mktemp("model")))


@pytest.mark.usefixtures("ray_session")
async def test_ranks_keep_a_log_of_their_own_and_name_themselves_in_it(
    world: TrainingData, tmp_path: Path
) -> None:
    identity, config = RunIdentity("agent", "json"), small_config(world.model, 2, world_size=2)
    groups = [
        replace(group, trajectories=tuple(replace(t, id=replace(t.id, step=7)) for t in group.trajectories))
        for group in world.groups
    ]
    group = await Learner.start(
        config, InMemoryFrameSource(world.pixels), identity=identity, log_dir=str(tmp_path)
    )
    try:
        await group.sft_step(world.trajectories)
        await group.grpo_step(groups)
    finally:
        group.close()
    for rank in range(2):
        text = (tmp_path / f"learner-rank-{rank}.log").read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        named = {(line["run"], line["worker"], line["rank"]) for line in lines}
        assert named == {("agent", f"learner-rank-{rank}", rank)}
        said = [line for line in lines if line["logger"] == "vz_ray.learner.learner_actor"]
        assert [line["message"].partition(" in ")[0] for line in said] == [
            f"Loaded {world.model} on rank {rank} of 2",
            f"Trained on {len(world.trajectories)} trajectories",
            f"Trained on {len(groups)} groups",
        ]
        assert [line.get("step") for line in said] == [None, 1, 7]
        # Nothing is written in DeepSpeed's own way, but for what it says while it is being imported.
        theirs = [line for line in text.splitlines() if line.startswith("[")]
        assert not [line for line in theirs if "real_accelerator" not in line]


@pytest.mark.usefixtures("ray_session")
async def test_two_ranks_learn_publish_name_the_one_that_died_and_start_again(
    world: TrainingData, tmp_path: Path
) -> None:
    config = small_config(world.model, 2, world_size=2)
    group = await Learner.start(config, InMemoryFrameSource(world.pixels))
    try:
        untrained = await group.compute_logprobs(world.trajectories)
        first = await group.grpo_step(world.groups)
        assert first["updates"] == 2
        assert np.isfinite(first["loss"])
        sender = LearnerShmTransport(group, tmp_path / "weights", 100_000, None, 60.0)
        update = await sender.prepare(1)
        manifest = read_manifest(update.transfer_info["directory"])
        names = [name for name, _ in read_tensors(update.transfer_info["directory"], manifest)]
        assert "lm_head.weight" in names
        assert len(names) == len(set(names))
        dying = asyncio.create_task(group.run_with_health_check(asyncio.sleep(60)))
        await asyncio.sleep(0.1)
        ray.kill(group._actors[1])
        began = time.monotonic()
        with pytest.raises(LearnerDiedError, match="learner-rank-1 died during ping"):
            await dying
        assert time.monotonic() - began < 10
        with pytest.raises(LearnerDiedError, match="learner-rank-1 died during compute_logprobs"):
            await group.compute_logprobs(world.trajectories)

        await group.restart()
        assert await group.run_with_health_check(asyncio.sleep(0, "played")) == "played"
        again = await group.compute_logprobs(world.trajectories)
        assert all(np.array_equal(before, now) for before, now in zip(untrained, again, strict=True))
        assert (await sender.prepare(2)).checksum != update.checksum
    finally:
        group.close()


@pytest.mark.usefixtures("ray_session")
async def test_a_group_whose_frame_changed_is_left_out_on_every_rank(world: TrainingData) -> None:
    """Two ranks with sharded weights: one that failed in mid-step would leave the other waiting."""
    changed = world.groups[1].trajectories[0].frame_refs[0].digest
    album = ChangedFrameSource({digest: rgb for digest, rgb in world.pixels.items() if digest != changed})

    async def step(source: InMemoryFrameSource, groups: Sequence[Group], most: float) -> dict[str, float]:
        config = small_config(world.model, 3, world_size=2, max_unreadable_share=most)
        learner = await Learner.start(config, source)
        try:
            return await learner.grpo_step(groups)
        finally:
            learner.close()

    learned = await step(album, world.groups, 0.4)
    expected = await step(InMemoryFrameSource(world.pixels), [world.groups[0], world.groups[2]], 0.0)
    assert (learned["groups_unreadable"], expected["groups_unreadable"]) == (1, 0)
    assert (learned["groups"], learned["loss"]) == (2, expected["loss"])
    with pytest.raises(UserError, match=r"1 of 3 groups .* learner.max_unreadable_share \(0.3\)"):
        await step(album, world.groups, 0.3)


@pytest.mark.usefixtures("ray_session")
async def test_a_late_rank_says_what_it_is_doing_unless_it_cannot(
    world: TrainingData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    group = await Learner.start(small_config(world.model, 0), HangingFrameSource({}))
    group._config = replace(group._config, timeout_s=1.0)
    pid = group._hang_reporters[0].process.pid
    try:
        with pytest.raises(StepTimeout) as late:
            await group.grpo_step(world.groups)
        assert (late.value.target, late.value.operation) == ("learner-rank-0", "find_unreadable")
        assert re.search(
            r"learner-rank-0 is in _fetch \(vz_ray/learner/frame_cache.py:\d+\)", str(late.value)
        )
        assert re.search(r"worlds.py\", line \d+ in resolve", caplog.text)
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(StepTimeout, match=r"write_weights within 0\.5 s") as late:
            await LearnerShmTransport(group, tmp_path, 100_000, None, 0.5).prepare(1)
        assert time.monotonic() - began < 25
        assert f"the state of learner-rank-0 is unknown: process {pid} (stopped) wrote no stacks" in str(
            late.value
        )
    finally:
        os.kill(pid, signal.SIGCONT)
        group.close()


@pytest.mark.usefixtures("ray_session")
async def test_ranks_for_which_there_is_no_place_are_named() -> None:
    config = replace(small_config("nowhere", 0, world_size=2), timeout_s=2.0)
    asked = "placing 2 learner ranks of {'CPU': 3.0} within 2 s (the cluster has {'CPU': 4.0} free)"
    with pytest.raises(StepTimeout, match=re.escape(asked)):
        await Learner.start(config, InMemoryFrameSource({}), cpus_per_rank=3.0)


@pytest.mark.usefixtures("ray_session")
async def test_a_model_without_weights_is_named(world: TrainingData, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="safetensors"):
        await Learner.start(small_config(tmp_path, 0), InMemoryFrameSource({}))


def test_frames_are_fetched_once_and_the_oldest_are_dropped(world: TrainingData) -> None:
    album = InMemoryFrameSource(world.pixels)
    refs = world.trajectories[0].frame_refs[:3]
    store = CachedFrameLoader(album, sum(r.width * r.height * 3 for r in refs[1:]), 10.0)
    assert store(refs).keys() == {r.digest for r in refs}
    store(refs[1:])
    store(refs)
    first = refs[0].digest
    assert album.asked == [[r.digest for r in refs], [first]]
