"""The learner as Ray actors: real ranks, frames from a source, failures."""

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

from tests.learner.rank_worker import small_config
from tests.learner.training_data import (
    ChangedFrameSource,
    HangingFrameSource,
    InMemoryFrameSource,
    TrainingData,
)
from tests.weight_sync.test_publisher import FakeReceiver
from vz_ray.env.trajectory import Group
from vz_ray.learner.frame_cache import CachedFrameLoader
from vz_ray.learner.learner import Learner, LearnerDiedError, _environment
from vz_ray.learner.weight_transports import LearnerNcclTransport, LearnerShmTransport
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.utils.errors import UserError
from vz_ray.utils.timeouts import StepTimeout
from vz_ray.weight_sync import WeightPublisher
from vz_ray.weight_sync.weight_store import read_manifest, read_tensors


@pytest.mark.usefixtures("ray_session")
async def test_each_rank_logs_json_lines_with_its_name(data: TrainingData, tmp_path: Path) -> None:
    identity, config = RunIdentity("agent", "json"), small_config(data.model, 2, world_size=2)
    groups = [
        replace(g, trajectories=tuple(replace(t, id=replace(t.id, step=7)) for t in g.trajectories))
        for g in data.groups
    ]
    learner = await Learner.start(config, InMemoryFrameSource(data.pixels), identity=identity, log_dir=str(tmp_path))
    try:
        await learner.sft_step(data.trajectories)
        await learner.grpo_step(groups)
    finally:
        learner.close()
    for rank in range(2):
        text = (tmp_path / f"learner-rank-{rank}.log").read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        identities = {(line["run"], line["worker"], line["rank"]) for line in lines}
        assert identities == {("agent", f"learner-rank-{rank}", rank)}
        own_lines = [line for line in lines if line["logger"] == "vz_ray.learner.learner_actor"]
        assert [line["message"].partition(" in ")[0] for line in own_lines] == [
            f"Loaded {data.model} on rank {rank} of 2",
            f"Trained on {len(data.trajectories)} trajectories",
            f"Trained on {len(groups)} groups",
        ]
        assert [line.get("step") for line in own_lines] == [None, 1, 7]
        # DeepSpeed's own format appears only in output of its import.
        deepspeed_lines = [line for line in text.splitlines() if line.startswith("[")]
        assert not [line for line in deepspeed_lines if "real_accelerator" not in line]


@pytest.mark.usefixtures("ray_session")
async def test_learner_names_a_dead_rank_and_restarts(data: TrainingData, tmp_path: Path) -> None:
    config = small_config(data.model, 2, world_size=2)
    learner = await Learner.start(config, InMemoryFrameSource(data.pixels))
    try:
        untrained = await learner.compute_logprobs(data.trajectories)
        first = await learner.grpo_step(data.groups)
        assert first["updates"] == 2
        assert np.isfinite(first["loss"])
        transport = LearnerShmTransport(learner, tmp_path / "weights", 100_000, 60.0)
        update = await transport.prepare(1)
        manifest = read_manifest(update.transfer_info["directory"])
        names = [name for name, _ in read_tensors(update.transfer_info["directory"], manifest)]
        assert "lm_head.weight" in names
        assert len(names) == len(set(names))
        dying = asyncio.create_task(learner.run_with_health_check(asyncio.sleep(60)))
        await asyncio.sleep(0.1)
        ray.kill(learner._actors[1])
        started = time.monotonic()
        with pytest.raises(LearnerDiedError, match="learner-rank-1 died during ping"):
            await dying
        assert time.monotonic() - started < 10
        with pytest.raises(LearnerDiedError, match="learner-rank-1 died during compute_logprobs"):
            await learner.compute_logprobs(data.trajectories)

        await learner.restart()
        assert await learner.run_with_health_check(asyncio.sleep(0, "result")) == "result"
        again = await learner.compute_logprobs(data.trajectories)
        assert all(np.array_equal(before, now) for before, now in zip(untrained, again, strict=True))
        assert (await transport.prepare(2)).checksum != update.checksum
        await kill_rank_during_publish(learner, transport)
    finally:
        learner.close()


async def kill_rank_during_publish(learner: Learner, transport: LearnerShmTransport) -> None:
    """Kill rank 0 while it writes the weights. The publish fails at once, and no engine was paused."""
    engine, rank = FakeReceiver("a"), learner._processes[0].stacks.pid
    os.kill(rank, signal.SIGSTOP)
    publish = asyncio.create_task(WeightPublisher(timeout_s=300).publish(3, transport, [engine]))
    assert not (await asyncio.wait({publish}, timeout=0.5))[0]
    os.kill(rank, signal.SIGKILL)
    with pytest.raises(LearnerDiedError, match="learner-rank-0 died during write_weights"):
        await asyncio.wait_for(publish, 30)
    assert engine.steps == []


@pytest.mark.usefixtures("ray_session")
async def test_copy_holds_the_announced_weights(data: TrainingData, tmp_path: Path) -> None:
    """With ZeRO-3, all ranks gather the copy; a step that was called meanwhile waits for it."""
    learner = await Learner.start(small_config(data.model, 3, world_size=2), InMemoryFrameSource(data.pixels))
    try:
        direct = LearnerShmTransport(learner, tmp_path / "direct", 10_000, 60.0)
        announced = LearnerNcclTransport(
            learner, 1, 60.0, LearnerShmTransport(learner, tmp_path / "copy", 10_000, 60.0)
        )
        update, before = await announced.prepare(1), await direct.prepare(1)
        announced.start_copy(update)
        copying = asyncio.create_task(announced.copy(update))
        await asyncio.sleep(0)
        await learner.grpo_step(data.groups)
        copy = await copying
        assert copy is not None
        assert copy.checksum == before.checksum != (await direct.prepare(2)).checksum

        late = await announced.prepare(2)
        await learner.grpo_step(data.groups)
        assert await announced.copy(late) is None

        # Only rank 0 fails; the other rank must not be left in a gather.
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="File exists"):
            await LearnerShmTransport(learner, tmp_path / "file", 10_000, 60.0).prepare(3)
        assert (await learner.grpo_step(data.groups))["updates"] == 2
    finally:
        learner.close()


@pytest.mark.usefixtures("ray_session")
async def test_group_with_changed_frame_is_dropped_on_all_ranks(data: TrainingData) -> None:
    """With ZeRO-3, a rank that fails in mid-step would leave the other in a collective."""
    changed = data.groups[1].trajectories[0].frame_refs[0].digest
    frame_source = ChangedFrameSource({digest: rgb for digest, rgb in data.pixels.items() if digest != changed})

    async def step(source: InMemoryFrameSource, groups: Sequence[Group], max_share: float) -> dict[str, float]:
        config = small_config(data.model, 3, world_size=2, max_unreadable_share=max_share)
        learner = await Learner.start(config, source)
        try:
            return await learner.grpo_step(groups)
        finally:
            learner.close()

    learned = await step(frame_source, data.groups, 0.4)
    expected = await step(InMemoryFrameSource(data.pixels), [data.groups[0], data.groups[2]], 0.0)
    assert (learned["groups_unreadable"], expected["groups_unreadable"]) == (1, 0)
    assert (learned["groups"], learned["loss"]) == (2, expected["loss"])
    with pytest.raises(UserError, match=r"1 of 3 groups .* learner.max_unreadable_share \(0.3\)"):
        await step(frame_source, data.groups, 0.3)


@pytest.mark.usefixtures("ray_session")
async def test_timeout_reports_the_current_function_of_a_rank(
    data: TrainingData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner = await Learner.start(small_config(data.model, 0), HangingFrameSource({}))
    learner._config = replace(learner._config, timeout_s=1.0)
    pid = learner._processes[0].stacks.pid
    try:
        with pytest.raises(StepTimeout) as late:
            await learner.grpo_step(data.groups)
        assert (late.value.target, late.value.operation) == ("learner-rank-0", "find_unreadable")
        assert re.search(r"learner-rank-0 is in _fetch \(vz_ray/learner/frame_cache.py:\d+\)", str(late.value))
        assert re.search(r"training_data.py\", line \d+ in resolve", caplog.text)
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(StepTimeout, match=r"write_weights within 0\.5 s") as late:
            await LearnerShmTransport(learner, tmp_path, 100_000, 0.5).prepare(1)
        assert time.monotonic() - started < 25
        assert f"the state of learner-rank-0 is unknown: process {pid} (stopped) wrote no stacks" in str(late.value)
    finally:
        os.kill(pid, signal.SIGCONT)
        learner.close()


@pytest.mark.usefixtures("ray_session")
async def test_unplaceable_ranks_time_out_with_the_demand() -> None:
    config = replace(small_config("nowhere", 0, world_size=2), timeout_s=2.0, cpus_per_rank=3.0)
    message = "placing 2 learner ranks of {'CPU': 3.0} within 2 s (the cluster has {'CPU': 4.0} free)"
    with pytest.raises(StepTimeout, match=re.escape(message)):
        await Learner.start(config, InMemoryFrameSource({}))


@pytest.mark.usefixtures("ray_session")
async def test_model_without_weights_is_refused(data: TrainingData, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="safetensors"):
        await Learner.start(small_config(tmp_path, 0), InMemoryFrameSource({}))


def test_frame_loader_caches_and_evicts_least_recent(data: TrainingData) -> None:
    frame_source = InMemoryFrameSource(data.pixels)
    refs = data.trajectories[0].frame_refs[:3]
    load = CachedFrameLoader(frame_source, sum(r.width * r.height * 3 for r in refs[1:]), 10.0)
    assert load(refs).keys() == {r.digest for r in refs}
    load(refs[1:])
    load(refs)
    first = refs[0].digest
    assert frame_source.requests == [[r.digest for r in refs], [first]]
    assert load.take_metrics() == {"frame_cache_hit_rate": 4 / 8}
    assert load.take_metrics() == {}


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1.0, 1), (3.5, 3)])
def test_ranks_use_a_thread_per_reserved_cpu(cpus: float, threads: int) -> None:
    config = small_config("nowhere", 0, cpus_per_rank=cpus)
    assert config.num_threads == threads
    assert _environment(config, gpus=1.0) == {"OMP_NUM_THREADS": str(threads)}
