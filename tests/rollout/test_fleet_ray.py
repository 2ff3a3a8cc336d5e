"""The fleet on real parts: Ray actors, vLLM engines, decoded videos, published weights, a killed worker."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import ray
import torch

from tests.rollout.reference import Reference, gap, shake, tiny
from vz_ray.clips.pool import ClipPool
from vz_ray.config.clips import ClipsConfig
from vz_ray.config.data import SynthConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.rollout import EngineConfig, RolloutConfig
from vz_ray.data.needle.synth import encode, tasks_of
from vz_ray.data.needle.world import Kind, make_video
from vz_ray.data.task import Task
from vz_ray.episode.protocols import Prompt
from vz_ray.episode.trajectory import Sampled, Sampling, Status, Trajectory
from vz_ray.reward import score
from vz_ray.rollout.engine import banned_ids
from vz_ray.rollout.fleet import Fleet
from vz_ray.rollout.ledger import Ledger
from vz_ray.rollout.remote import RayWorker, fetch
from vz_ray.rollout.worker import WorkerSetup
from vz_ray.weights import (
    Manifest,
    ModuleSource,
    Publisher,
    ShmSender,
    WeightStore,
    build_probe,
    learner_logprobs,
)
from vz_ray.weights.store import read_tensors

pytestmark = pytest.mark.asyncio(loop_scope="module")

EPISODE = EpisodeConfig(
    prompt="conf/prompt/tiny.yaml",
    max_turn_tokens=24,
    max_context=900,
    overview_frames=8,
    min_pixels=784,
    max_pixels=784,
)


class World:
    """Everything that a run has, but the learner's training."""

    def __init__(
        self, path: Path, fleet: Fleet, tasks: list[Task], pool: ClipPool, reference: Reference
    ) -> None:
        self.fleet, self.tasks, self.pool, self.reference = fleet, tasks, pool, reference
        self.store = WeightStore(path / "weights", bucket_bytes=1 << 20)
        self.ledger = Ledger()
        self.sender = ShmSender(self.store, ModuleSource(reference.model), self.score)

    def score(self) -> tuple[float, ...]:
        reference = self.reference
        probe = build_probe(reference.tokenizer)
        return learner_logprobs(reference.model, reference.processor.image_processor, probe, reference.banned)

    async def worst_gap(self, trajectory: Trajectory) -> float:
        """Largest difference to the learner's log-probs over all turns of a trajectory."""
        frames = await self.pool.resolve(trajectory.refs)
        ids = list(trajectory.prompt.compact_ids)
        seen = len(trajectory.prompt.refs)
        worst = 0.0
        for turn in trajectory.turns:
            assert isinstance(turn.action, Sampled)
            prompt = Prompt(tuple(ids), tuple(frames[:seen]), ())
            expected = self.reference.logprobs(
                prompt, turn.action.token_ids, turn.action.sampling.temperature
            )
            worst = max(worst, gap(turn.action.logprobs, expected))
            ids += turn.action.token_ids
            if turn.reply is not None:
                ids += turn.reply.compact_ids
                seen += len(turn.reply.refs)
        return worst


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fleet")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(path: Path, engine_config: EngineConfig) -> AsyncIterator[World]:
    video = make_video(3, 64.0, (Kind.IDENTIFY,))
    encode(video, path / "video.mp4", SynthConfig())
    question = tasks_of(video, path / "video.mp4")[0]
    tasks = [replace(question, task_id=f"{question.task_id}-{i}") for i in range(4)]
    model = tiny(path / "model")
    # Names of sockets are limited to 107 bytes, and pytest's directories are deep.
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=str(Path(tempfile.gettempdir()) / f"vz-{os.getpid()}"),
        object_store_memory=200_000_000,
    )
    pool = ClipPool.start(ClipsConfig(actors=1, cpus=0.1, disk_gb=0))
    config = RolloutConfig(
        engine=replace(engine_config, max_num_seqs=16), workers=1, episodes_per_worker=8, cpus_per_worker=0.1
    )
    reward = RewardConfig(function="tests.reward.own:brevity")
    setup = WorkerSetup(str(model), config, EPISODE, reward, pool, score, str(path / "logs"))
    reference = Reference(model, banned_ids(model))
    publisher = Publisher(deadline_s=60, probe=build_probe(reference.tokenizer))
    fleet = Fleet(lambda name: RayWorker(name, setup), config, publisher)
    try:
        await fleet.start()
        yield World(path, fleet, tasks, pool, reference)
        await fleet.close()
    finally:
        ray.shutdown()


async def test_groups_are_played_scored_and_equal_to_the_learner(world: World) -> None:
    shake(world.reference.model, 1)
    report = await world.fleet.publish(1, world.sender)
    assert report.probe_gap is not None
    assert report.probe_gap <= 1e-4
    sampling = Sampling(temperature=0.7, max_tokens=24, seed=5)
    groups = [g async for g in world.fleet.play(world.tasks[:2], 3, sampling, world.ledger, iteration=1)]
    assert sorted(g.task for g in groups) == sorted(t.task_id for t in world.tasks[:2])
    for trajectory in (t for group in groups for t in group.trajectories):
        assert trajectory.status is not Status.FAILED, trajectory.error
        assert trajectory.reward is not None
        assert set(trajectory.reward.more) == {"brevity", "turns"}, (
            "the user's own parts, found in the worker"
        )
        assert trajectory.weight_versions == (1,)
        assert len(trajectory.refs) == len(trajectory.grids) >= 8
        assert await world.worst_gap(trajectory) <= 1e-4
    assert len({t.turns[0].action.token_ids for g in groups for t in g.trajectories}) > 1
    [stats] = await world.fleet.stats()
    assert stats.version == 1
    assert stats.played == 6


async def test_a_killed_worker_is_replaced_and_nothing_is_lost(world: World) -> None:
    """SIGKILL in mid-play: every group complete, the new worker has the present weights, no orphan stays."""
    [stats] = await world.fleet.stats()
    engines = psutil.Process(stats.pid).children(recursive=True)
    assert engines
    groups = world.fleet.play(world.tasks, 4, Sampling(max_tokens=24), world.ledger, iteration=2)
    first = await anext(groups)
    os.kill(stats.pid, signal.SIGKILL)
    rest = [group async for group in groups]
    trajectories = [t for group in (first, *rest) for t in group.trajectories]
    assert len(trajectories) == 16
    assert all(t.status is not Status.FAILED for t in trajectories)
    replayed = [t for t in trajectories if t.worker == "rollout-1"]
    assert replayed
    assert {version for t in replayed for version in t.weight_versions} == {1}
    assert [(s.name, s.state.value) for s in world.fleet.seats()] == [
        ("rollout-0", "dead"),
        ("rollout-1", "ready"),
    ]
    assert await world.worst_gap(replayed[0]) <= 1e-4
    assert len([key for key in world.ledger.accepted if key[0] == 2]) == 16
    _, alive = psutil.wait_procs(engines, timeout=30)
    assert not alive


async def test_the_replacement_takes_the_next_version(world: World) -> None:
    shake(world.reference.model, 2)
    report = await world.fleet.publish(2, world.sender)
    assert report.updated == ("rollout-1",)
    [group] = [g async for g in world.fleet.play(world.tasks[:1], 2, Sampling(), world.ledger, iteration=3)]
    assert group.trajectories[0].weight_versions == (2,)


async def test_a_version_is_fetched_to_a_node_that_lacks_it(world: World, tmp_path: Path) -> None:
    number = world.store.numbers()[-1]
    node = ray.get_runtime_context().get_node_id()
    manifest, *buckets = await fetch(str(world.store.path(number)), node)
    there = WeightStore(tmp_path / "there").adopt(
        Manifest.from_json(await manifest), [await bucket for bucket in buckets]
    )
    here = dict(read_tensors(world.store.path(number), world.store.load(number)))
    copied = dict(read_tensors(there, world.store.load(number)))
    assert here.keys() == copied.keys()
    assert all(torch.equal(here[name], copied[name]) for name in here)
