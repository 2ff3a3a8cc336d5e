"""The rollout scheduler with real Ray actors, vLLM engines, decoders and weight publishes."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import ray
import torch

from tests.rollout.fake_workers import start_groups
from tests.rollout.hf_reference import HfReference, build_tiny_checkpoint, max_abs_diff, perturb
from tests.rollout.rollout_cluster import EPISODE
from vz_ray.config.clips import ClipsConfig
from vz_ray.config.data import SynthConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.rollout import EngineConfig, RolloutConfig
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.decode.pool import DecodePool
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.protocols import Prompt
from vz_ray.env.task import Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    Group,
    SampledAction,
    SamplingParams,
    Trajectory,
)
from vz_ray.needle.needle_video import QuestionKind, make_video
from vz_ray.needle.oracle import format_zoom_turn
from vz_ray.needle.synthesis import encode_video, make_tasks
from vz_ray.rewards import score_episode
from vz_ray.rollout.ray_worker import RayWorkerClient
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.rollout.rollout_worker import WorkerSetup
from vz_ray.rollout.sample_tracker import SampleTracker
from vz_ray.rollout.turn_log import TurnLog
from vz_ray.rollout.vllm_engine import banned_token_ids
from vz_ray.rollout.weight_copies import WeightCopies
from vz_ray.rollout.worker_handle import WorkerLostError, WorkerState
from vz_ray.weight_sync import (
    ModuleSource,
    ParityCheck,
    ShmTransport,
    WeightManifest,
    WeightPublisher,
    WeightStore,
    build_parity_probe,
)
from vz_ray.weight_sync.weight_store import read_manifest, read_tensors

pytestmark = pytest.mark.asyncio(loop_scope="module")


class SingleNodeRollout:
    """All components of a run except training."""

    def __init__(
        self,
        path: Path,
        scheduler: RolloutScheduler,
        tasks: list[Task],
        pool: DecodePool,
        reference: HfReference,
    ) -> None:
        self.scheduler, self.tasks, self.pool, self.reference = scheduler, tasks, pool, reference
        self.store = WeightStore(path / "weights", bucket_bytes=1 << 20)
        self.tracker = SampleTracker()
        self.transport = ShmTransport(self.store, ModuleSource(reference.model), reference.score_probe)

    def start_groups(
        self, tasks: list[Task], size: int, sampling: SamplingParams, step: int
    ) -> list[asyncio.Task[Group]]:
        return start_groups(self.scheduler, tasks, size, self.tracker, sampling, step)

    async def max_logprob_diff(self, trajectory: Trajectory) -> float:
        """Return the largest difference to the learner's log-probs over all turns of a trajectory."""
        frames = await self.pool.resolve(trajectory.frame_refs)
        ids = list(trajectory.prompt.compact_ids)
        num_frames = len(trajectory.prompt.frame_refs)
        max_diff = 0.0
        for turn in trajectory.turns:
            assert isinstance(turn.action, SampledAction)
            prompt = Prompt(tuple(ids), tuple(frames[:num_frames]), ())
            expected = self.reference.logprobs(prompt, turn.action.token_ids, turn.action.sampling_params.temperature)
            max_diff = max(max_diff, max_abs_diff(turn.action.logprobs, expected))
            ids += turn.action.token_ids
            if turn.observation is not None:
                ids += turn.observation.compact_ids
                num_frames += len(turn.observation.frame_refs)
        return max_diff


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scheduler")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def single_node(path: Path, engine_config: EngineConfig) -> AsyncIterator[SingleNodeRollout]:
    video = make_video(3, 64.0, (QuestionKind.IDENTIFY,))
    encode_video(video, path / "video.mp4", SynthConfig())
    task = make_tasks(video, path / "video.mp4")[0]
    tasks = [replace(task, task_id=f"{task.task_id}-{i}") for i in range(4)]
    model = build_tiny_checkpoint(path / "model")
    # Socket paths are limited to 107 bytes, and pytest's directories are deep.
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=str(Path(tempfile.gettempdir()) / f"vz-{os.getpid()}"),
        object_store_memory=200_000_000,
    )
    pool = DecodePool.start(ClipsConfig(num_actors=1, cpus_per_actor=0.1, disk_cache_gib=0))
    config = RolloutConfig(
        engine=replace(engine_config, max_num_seqs=16),
        num_workers=1,
        max_concurrent_episodes=8,
        cpus_per_worker=0.1,
    )
    reward = RewardConfig(function="tests.rewards.user_functions:brevity")
    setup = WorkerSetup(str(model), config, EPISODE, reward, pool, score_episode, str(path / "logs"))
    reference = HfReference(model, banned_token_ids(model))
    probe = build_parity_probe(reference.tokenizer, reference.processor.image_processor)
    publisher = WeightPublisher(timeout_s=60, parity=ParityCheck(probe))
    scheduler = RolloutScheduler(lambda name: RayWorkerClient(name, setup), config, publisher)
    try:
        await scheduler.pool.start()
        yield SingleNodeRollout(path, scheduler, tasks, pool, reference)
        await scheduler.pool.close()
    finally:
        ray.shutdown()


async def test_group_logprobs_match_the_learner(single_node: SingleNodeRollout) -> None:
    perturb(single_node.reference.model, 1)
    report = await single_node.scheduler.pool.publish(1, single_node.transport)
    assert report.probe_gap is not None
    assert report.probe_gap.mean <= 1e-4
    sampling = SamplingParams(temperature=0.7, max_tokens=24, seed=5)
    groups = await asyncio.gather(*single_node.start_groups(single_node.tasks[:2], 3, sampling, step=1))
    assert sorted(g.task_id for g in groups) == sorted(t.task_id for t in single_node.tasks[:2])
    for trajectory in (t for group in groups for t in group.trajectories):
        assert trajectory.status is not EpisodeStatus.FAILED, trajectory.error
        assert trajectory.reward is not None
        assert set(trajectory.reward.extra) == {"brevity", "turns"}, "parts of the user function"
        assert trajectory.weight_versions == (1,)
        assert len(trajectory.frame_refs) == len(trajectory.grids) >= 8
        assert await single_node.max_logprob_diff(trajectory) <= 1e-4
    assert len({t.turns[0].action.token_ids for g in groups for t in g.trajectories}) > 1
    [stats] = await single_node.scheduler.pool.worker_stats()
    assert stats.weight_version == 1
    assert stats.finished_episodes == 6


async def test_killed_worker_is_replaced_without_losses(single_node: SingleNodeRollout) -> None:
    """After SIGKILL, all groups complete, the new worker has the current weights, and no orphan remains."""
    [stats] = await single_node.scheduler.pool.worker_stats()
    engines = psutil.Process(stats.pid).children(recursive=True)
    assert engines
    groups = single_node.start_groups(single_node.tasks, 4, SamplingParams(max_tokens=24), step=2)
    await asyncio.wait(groups, return_when=asyncio.FIRST_COMPLETED)
    os.kill(stats.pid, signal.SIGKILL)
    trajectories = [t for group in await asyncio.gather(*groups) for t in group.trajectories]
    assert len(trajectories) == 16
    assert all(t.status is not EpisodeStatus.FAILED for t in trajectories)
    retried = [t for t in trajectories if t.worker == "rollout-1"]
    assert retried
    assert {version for t in retried for version in t.weight_versions} == {1}
    assert [(s.name, s.state.value) for s in single_node.scheduler.pool.worker_statuses()] == [
        ("rollout-0", "dead"),
        ("rollout-1", "ready"),
    ]
    assert await single_node.max_logprob_diff(retried[0]) <= 1e-4
    assert len([key for key in single_node.tracker.accepted if key[0] == 2]) == 16
    _, alive = psutil.wait_procs(engines, timeout=30)
    assert not alive


class ZoomThenFail:
    """Zoom once; the worker is lost in the second turn."""

    def __init__(self, chat_format: ChatFormat) -> None:
        self._chat_format = chat_format

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str) -> ExternalAction:
        if request_id.endswith("turn1"):
            raise WorkerLostError("the worker was lost")
        text = format_zoom_turn("x", 8, 10, 2)
        return ExternalAction(text, self._chat_format.encode_assistant(text))


async def test_worker_continues_an_episode_of_a_lost_worker(single_node: SingleNodeRollout, path: Path) -> None:
    """The log-probs of the next turn match: tokens and frames of the completed turn are the same."""
    chat_format, task, turns = load_chat_format(path / "model", EPISODE), single_node.tasks[0], TurnLog()
    lost, retried = EpisodeId(9, task.task_id, 0), EpisodeId(9, task.task_id, 0, attempt=1)
    with pytest.raises(WorkerLostError):
        await run_episode(
            task,
            ZoomThenFail(chat_format),
            single_node.pool,
            chat_format,
            EPISODE,
            episode_id=lost,
            sampling_params=SamplingParams(),
            on_event=turns.recorder(lost),
        )
    [worker] = [worker for worker in single_node.scheduler.pool._workers if worker.state is WorkerState.READY]
    reported = turns.take_changed()[lost]
    trajectory = await worker.client.run_episode(task, retried, SamplingParams(max_tokens=24, seed=1), None, reported)
    assert trajectory.extra["resumed_turns"] == 1
    zoom, answer = trajectory.turns[:2]
    assert (zoom.action, zoom.observation) == (
        TurnLog.decode(reported)[0].action,
        TurnLog.decode(reported)[0].observation,
    )
    assert zoom.observation is not None
    assert len(zoom.observation.frame_refs) == 4
    assert isinstance(answer.action, SampledAction)
    frames = await single_node.pool.resolve([*trajectory.prompt.frame_refs, *zoom.observation.frame_refs])
    ids = (*trajectory.prompt.compact_ids, *zoom.action.token_ids, *zoom.observation.compact_ids)
    expected = single_node.reference.logprobs(Prompt(ids, tuple(frames), ()), answer.action.token_ids, 1.0)
    assert max_abs_diff(answer.action.logprobs, expected) <= 1e-4


async def test_replacement_receives_the_next_version(single_node: SingleNodeRollout) -> None:
    perturb(single_node.reference.model, 2)
    report = await single_node.scheduler.pool.publish(2, single_node.transport)
    assert report.updated == ("rollout-1",)
    group = await single_node.start_groups(single_node.tasks[:1], 2, SamplingParams(), step=3)[0]
    assert group.trajectories[0].weight_versions == (2,)


async def test_version_is_copied_once_per_node_bucket_by_bucket(single_node: SingleNodeRollout, tmp_path: Path) -> None:
    """Of three workers on two other nodes, two copy; the second worker of a node copies after the first has failed."""
    number = single_node.store.versions()[-1]
    directory, source = str(single_node.store.path(number)), ray.get_runtime_context().get_node_id()
    copies, staged = WeightCopies(), list[tuple[str, int]]()

    def worker(node: str, *, fails: bool = False) -> asyncio.Task[None]:
        store = WeightStore(tmp_path / node)

        async def call(method: str, _: str, manifest: str, *args: Any) -> None:
            if method == "commit_weights":
                store.commit_staged(WeightManifest.from_json(manifest))
                return
            index, bucket = args
            store.stage_bucket(WeightManifest.from_json(manifest), index, await bucket)
            staged.append((node, index))
            if fails:
                raise WorkerLostError("gone")

        return asyncio.create_task(copies.ensure(directory, source, node, call))

    failing, *others = worker("b", fails=True), worker("b"), worker("c")
    with pytest.raises(WorkerLostError):
        await failing
    await asyncio.gather(*others)
    await worker("b")
    manifest = read_manifest(directory)
    count = len(manifest.bucket_bytes)
    assert count > 1
    assert sorted(staged) == sorted([("b", 0), *(("b", i) for i in range(count)), *(("c", i) for i in range(count))])
    original = dict(read_tensors(directory, manifest))
    for node in ("b", "c"):
        copied = dict(read_tensors(tmp_path / node / Path(directory).name, manifest))
        assert original.keys() == copied.keys()
        assert all(torch.equal(original[name], copied[name]) for name in original)
