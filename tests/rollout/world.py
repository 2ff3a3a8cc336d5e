"""A fleet on nodes that come and go: real raylets, actors, engines and decoders, and an exact account."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.nodes import Nodes, started
from tests.rollout.reference import load, shake, tiny
from tests.small_run import left_of
from vz_ray.clips.pool import ClipPool
from vz_ray.config.clips import ClipsConfig
from vz_ray.config.data import SynthConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.rollout import EngineConfig, RolloutConfig
from vz_ray.data.needle.synth import encode, tasks_of
from vz_ray.data.needle.world import Kind, make_video
from vz_ray.data.task import Task
from vz_ray.episode.trajectory import Group, Sampling, Status
from vz_ray.observe.deadline import within
from vz_ray.reward import score
from vz_ray.rollout.fleet import Fleet
from vz_ray.rollout.ledger import Ledger
from vz_ray.rollout.member import Seat
from vz_ray.rollout.remote import RayWorker
from vz_ray.rollout.state import WorkerState
from vz_ray.rollout.worker import WorkerSetup, WorkerStats
from vz_ray.weights import ModuleSource, Publisher, PublishReport, ShmSender, Update, WeightStore

REPLACED_S = 240.0
"""Within this the replacement has completed episodes: its engine starts in 10 to 20 s on two calm cores,
and has taken ten times as long on busy ones."""

NODE = {"num_cpus": 2}
"""Room for one worker, and for decoders beside it."""

EPISODE = EpisodeConfig(
    prompt="conf/prompt/tiny.yaml",
    max_turn_tokens=24,
    max_context=900,
    overview_frames=8,
    min_pixels=784,
    max_pixels=784,
)


class Trap:
    """Something that happens once, to whoever is next to step into it."""

    def __init__(self) -> None:
        self.spring: Callable[[], None] | None = None

    def step_in(self) -> None:
        spring, self.spring = self.spring, None
        if spring is not None:
            spring()


class TrappedWorker(RayWorker):
    """Steps into a trap when it has been paused for new weights, before it receives them."""

    def __init__(self, name: str, setup: WorkerSetup, trap: Trap) -> None:
        super().__init__(name, setup)
        self._trap = trap

    async def receive(self, update: Update) -> None:
        self._trap.step_in()
        await super().receive(update)


@dataclass
class World:
    """A fleet on nodes, and the account of what it plays."""

    nodes: Nodes
    setup: WorkerSetup
    fleet: Fleet
    tasks: list[Task]
    model: Any
    sender: ShmSender
    trap: Trap
    """Sprung by the next worker that has been paused for new weights."""
    ledger: Ledger = field(default_factory=Ledger)
    iterations: int = 0
    places: list[Any] = field(default_factory=list)
    """Nodes for workers, in the order in which they were added."""
    plays: list[asyncio.Task[list[Group]]] = field(default_factory=list)

    def begin(self, groups: int, samples: int = 4) -> asyncio.Task[list[Group]]:
        """Starts to play `groups` groups of an iteration of their own."""
        self.iterations += 1
        tasks, iteration = self.tasks[:groups], self.iterations

        async def play() -> list[Group]:
            sampling = Sampling(max_tokens=24, seed=iteration)
            playing = self.fleet.play(tasks, samples, sampling, self.ledger, iteration=iteration)
            return [group async for group in playing]

        self.plays.append(asyncio.create_task(play()))
        return self.plays[-1]

    async def end(self, play: asyncio.Task[list[Group]], samples: int = 4) -> Counter[str]:
        """Waits for the groups and checks that each owed sample came once; how many each worker played."""
        groups = await within(REPLACED_S, play, who="fleet", what="the groups that were in flight")
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        assert {t.status for t in trajectories} <= set(Status) - {Status.FAILED}, [
            t.error for t in trajectories
        ]
        iteration = trajectories[0].id.iteration
        owed = [(iteration, group.task, sample) for group in groups for sample in range(samples)]
        assert Counter(t.id.owed for t in trajectories) == Counter(owed)
        taken = {key: attempt for key, attempt in self.ledger.accepted.items() if key[0] == iteration}
        assert taken == {t.id.owed: t.id.attempt for t in trajectories}
        assert not self.ledger.dropped
        assert not self.ledger.refused
        self.ledger.close(iteration)  # refuses if anything is still owed
        return Counter(t.worker for t in trajectories)

    async def plays_on(self, version: int, lost: str) -> str:
        """The name of the worker in the place of `lost`, after it played whole episodes with that version."""
        play = self.begin(2)
        groups = await within(REPLACED_S, play, who="fleet", what=f"groups after {lost} was lost")
        assert {t.weight_versions for group in groups for t in group.trajectories} == {(version,)}
        (name,) = await self.end(play)
        assert name != lost
        assert self.seat(name).state is WorkerState.READY
        assert self.seat(lost).state is WorkerState.DEAD
        return name

    async def publish(self) -> PublishReport:
        version = self.fleet.version + 1
        shake(self.model, version)
        return await within(
            REPLACED_S, self.fleet.publish(version, self.sender), who="fleet", what="a publish"
        )

    async def worker(self) -> WorkerStats:
        """The one that serves."""
        await self.until(lambda: any(seat.state is WorkerState.READY for seat in self.fleet.seats()))
        (stats,) = await self.fleet.stats()
        return stats

    async def all_serve(self) -> None:
        """Waits until there are as many workers as there should be, and no more."""
        await self.until(lambda: self.fleet.size == self.setup.rollout.workers)

    def seat(self, name: str) -> Seat:
        return next(seat for seat in self.fleet.seats() if seat.name == name)

    async def playing(self, episodes: int) -> WorkerStats:
        """Waits until the worker that serves plays so many episodes."""
        for _ in range(400):
            if (stats := await self.worker()).playing >= episodes:
                return stats
            await asyncio.sleep(0.05)
        raise AssertionError(f"no {episodes} episodes began: {self.fleet.seats()}")

    async def until(self, what: Callable[[], bool], seconds: float = REPLACED_S) -> None:
        for _ in range(int(seconds / 0.05)):
            if what():
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"it did not come to that within {seconds:g} s: {self.fleet.seats()}")

    @contextmanager
    def held(self) -> Iterator[list[psutil.Process]]:
        """Decoders stand still, so that every episode that begins waits for its overview."""
        decoders = self.nodes.actors("DecodeActor")
        assert decoders
        for decoder in decoders:
            decoder.send_signal(signal.SIGSTOP)
        try:
            yield decoders
        finally:
            for decoder in decoders:
                if decoder.is_running():
                    decoder.send_signal(signal.SIGCONT)


def engines_of(stats: WorkerStats) -> list[psutil.Process]:
    """The processes of a worker's engine; the one that computes, and holds the memory, is the first."""
    found: list[psutil.Process] = psutil.Process(stats.pid).children(recursive=True)
    found.sort(key=lambda process: process.memory_info().rss, reverse=True)
    assert found, stats
    return found


@asynccontextmanager
async def opened(
    path: Path, engine: EngineConfig, *, workers: int = 1, attempts: int = 3
) -> AsyncIterator[World]:
    """A world of as many nodes as workers, with one version published; nothing of it is left behind."""
    video = make_video(3, 64.0, (Kind.IDENTIFY,))
    encode(video, path / "video.mp4", SynthConfig())
    question = tasks_of(video, path / "video.mp4")[0]
    tasks = [replace(question, task_id=f"{question.task_id}-{i}") for i in range(4 * workers)]
    model = tiny(path / "model")
    learned = load(model)
    config = RolloutConfig(
        engine=replace(engine, max_num_seqs=16),
        workers=workers,
        episodes_per_worker=8,
        cpus_per_worker=1.5,
        attempts=attempts,
        health_every_s=0.5,
    )
    with started(num_cpus=1) as nodes, pytest.MonkeyPatch.context() as patch:
        patch.setattr("vz_ray.rollout.crew._FIRST_WORD_S", 1.0)
        pool = ClipPool.start(ClipsConfig(actors=2, cpus=0.1, disk_gb=0))
        setup = WorkerSetup(str(model), config, EPISODE, RewardConfig(), pool, score, str(path / "logs"))
        trap = Trap()
        fleet = Fleet(lambda name: TrappedWorker(name, setup, trap), config, Publisher(deadline_s=60))
        sender = ShmSender(WeightStore(path / "weights", bucket_bytes=1 << 20), ModuleSource(learned))
        world = World(nodes, setup, fleet, tasks, learned, sender, trap)
        for _ in range(workers):
            world.places.append(nodes.add(**NODE))
        try:
            await fleet.start()
            await world.publish()
            yield world
            assert world.ledger == Ledger()
        finally:
            for play in world.plays:
                play.cancel()
            await asyncio.gather(*world.plays, return_exceptions=True)
            engines = nodes.below("WorkerActor")
            await fleet.close()
            assert not left_of(engines)
