"""A rollout worker: one engine that plays whole episodes, many at once.

A Ray actor in production; the class itself knows nothing of Ray, so that it
runs in any process.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import psutil
from blake3 import blake3

from vz_ray.clips import ClipPool, HandleStats
from vz_ray.clips.gate import asking_as
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.data.task import Task
from vz_ray.episode.protocols import FrameSource, Ranker
from vz_ray.episode.runner import play
from vz_ray.episode.selectors import selector_of
from vz_ray.episode.trajectory import EpisodeId, RewardParts, Sampling, Trajectory
from vz_ray.episode.wire import WireFormat, Wording
from vz_ray.observe.deadline import within
from vz_ray.observe.logs import in_actor, keep_output_in
from vz_ray.observe.records import Badge, about
from vz_ray.observe.stacks import stacks
from vz_ray.rollout.engine import Engine, EngineFailed
from vz_ray.rollout.engine_stats import EngineStats, Room
from vz_ray.weights import Probe, Update

REWARD_S = "reward_s"
"""Under which `Trajectory.extra` holds the seconds that scoring took."""

Scorer = Callable[[Trajectory, Task, RewardConfig], RewardParts]
"""May block, while a judge is asked: it is called in a thread."""


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What every worker of a fleet is made from.

    Attributes:
        model: Checkpoint directory, readable on the worker's node.
        version: Weight version of that checkpoint.
        frames: Where clips come from.
        score: Scores each finished episode.
        logs: Directory for `<worker>.log` and `<worker>.engine.log`.
        transport: How weights come: `shm` or `nccl`.
        training: Refuse to sample what cannot be trained on.
        ranker: The image-text model, for episodes whose frames are chosen with it.
        badge: Which run it logs for, and how.
    """

    model: str
    rollout: RolloutConfig
    episode: EpisodeConfig
    reward: RewardConfig
    frames: FrameSource
    score: Scorer
    logs: str
    version: int = 0
    transport: str = "shm"
    training: bool = True
    ranker: Ranker | None = None
    badge: Badge = Badge()  # noqa: RUF009 - frozen


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """A worker's counts since its start.

    Attributes:
        playing: Episodes at this moment.
        played: Episodes finished.
        pid: Of the worker's own process.
        rss_mb: Resident memory of that process.
        engine_mb: Resident memory of the processes that it has started.
        clips: What its handle of the clip pool does.
    """

    name: str
    pid: int
    version: int
    playing: int
    played: int
    rss_mb: float
    engine_mb: float
    engine: EngineStats
    clips: HandleStats = HandleStats()  # noqa: RUF009 - frozen


def sample_seed(seed: int | None, id: EpisodeId) -> int | None:
    """A seed of its own for each sample, the same for each attempt at it; None stays None."""
    if seed is None:
        return None
    return int.from_bytes(blake3(f"{seed}|{id.owed}".encode()).digest(4), "big") >> 1


def _rss_mb(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / 1e6
    except psutil.Error:
        return 0.0  # it has ended


class RolloutWorker:
    """Plays episodes with its own engine; every method names this worker in its errors."""

    engine_type: ClassVar[type[Engine]] = Engine

    def __init__(self, name: str, setup: WorkerSetup, *, own_process: bool = True) -> None:
        self.name = name
        self._setup = setup
        self._engine: Engine | None = None
        self._wires: dict[tuple[str, str], WireFormat] = {}
        self._slots = asyncio.Semaphore(setup.rollout.episodes_per_worker)
        self._playing = 0
        self._played = 0
        # Episodes that wait for a judge keep no place, so there may be more of them than play.
        self._scoring = ThreadPoolExecutor(2 * setup.rollout.episodes_per_worker, thread_name_prefix="score")
        if own_process:
            keep_output_in(Path(setup.logs) / f"{name}.log")
            in_actor(name, setup.badge)

    async def start(self) -> None:
        """Starts the engine."""
        from transformers import AutoTokenizer

        setup, config = self._setup, self._setup.rollout
        selector_of(setup.episode.selector, setup.ranker)  # what it lacks is said before an engine starts
        self._engine = await self.engine_type.start(
            setup.model,
            config.engine,
            name=self.name,
            log=Path(setup.logs) / f"{self.name}.engine.log",
            version=setup.version,
            transport=setup.transport,
            training=setup.training,
            start_deadline_s=config.start_deadline_s,
            turn_deadline_s=config.turn_deadline_s,
        )
        self._tokenizer = AutoTokenizer.from_pretrained(setup.model, trust_remote_code=False)
        self._wire(setup.episode)

    async def play_episode(
        self, task: Task, id: EpisodeId, sampling: Sampling, episode: EpisodeConfig | None = None
    ) -> Trajectory:
        """Plays and scores one episode, by the rules of `episode` or its own.

        Raises:
            Overdue: It took longer than the episode deadline, or a turn or clip than its own.
            EngineFailed: The engine is of no use any more.
        """
        engine, setup = self._engine, self._setup
        if engine is None:
            raise EngineFailed(f"{self.name} was asked to play {id} before its engine had started")
        with about(iteration=id.iteration, episode=str(id)):
            return await self._play(engine, task, id, sampling, episode or setup.episode)

    async def _play(
        self, engine: Engine, task: Task, id: EpisodeId, sampling: Sampling, rules: EpisodeConfig
    ) -> Trajectory:
        setup, wire = self._setup, self._wire(rules)
        async with self._slots:
            self._playing += 1
            try:
                drawn = replace(sampling, seed=sample_seed(sampling.seed, id))
                game = play(
                    task,
                    engine,
                    setup.frames,
                    wire,
                    rules,
                    id=id,
                    sampling=drawn,
                    worker=self.name,
                    ranker=setup.ranker,
                )
                deadline = setup.rollout.episode_deadline_s
                with asking_as(str(id)):
                    trajectory = await within(deadline, game, who=self.name, what=f"episode {id}")
            finally:
                self._playing -= 1
        self._played += 1
        loop, began = asyncio.get_running_loop(), time.monotonic()
        score = loop.run_in_executor(self._scoring, setup.score, trajectory, task, setup.reward)
        parts = await within(setup.reward.deadline_s, score, who=self.name, what=f"the reward of {id}")
        extra = {**trajectory.extra, REWARD_S: round(time.monotonic() - began, 6)}
        return replace(trajectory, reward=parts, extra=extra)

    def _wire(self, rules: EpisodeConfig) -> WireFormat:
        """The wire format of these rules; made once for each wording."""
        key = (rules.prompt, rules.format)
        if key not in self._wires:
            wording = Wording.load(rules.prompt)
            self._wires[key] = WireFormat(self._tokenizer, wording, compat=rules.format == "compat")
        return self._wires[key]

    async def logprobs(self, probe: Probe) -> tuple[float, ...]:
        """The engine's log-probs `[T]` of the probe's tokens."""
        return await self._ready().score(probe)

    async def init_weights(self, info: dict[str, object]) -> None:
        """Connects to the learner (NCCL only)."""
        await self._ready().init_weights(info)

    async def pause(self) -> None:
        await self._ready().pause()

    async def receive(self, update: Update) -> None:
        await self._ready().receive(update)

    async def thaw(self) -> None:
        await self._ready().thaw()

    async def resume(self) -> None:
        await self._ready().resume()

    async def check(self) -> Room:
        """What it could still take in; raises `EngineFailed` if the engine's process is gone."""
        await self._ready().check()
        return self.room()

    def room(self) -> Room:
        """What it could still take in."""
        stats = self._ready().stats()
        return Room(stats.kv_tokens - stats.kv_used, self._playing)

    async def stats(self) -> WorkerStats:
        engine, process = self._ready(), psutil.Process()
        frames = self._setup.frames
        below = [_rss_mb(child) for child in process.children(recursive=True)]
        return WorkerStats(
            name=self.name,
            pid=os.getpid(),
            version=engine.version,
            playing=self._playing,
            played=self._played,
            rss_mb=_rss_mb(process),
            engine_mb=sum(below),
            engine=engine.stats(),
            clips=frames.handle() if isinstance(frames, ClipPool) else HandleStats(),
        )

    async def whereabouts(self) -> tuple[str, str]:
        """What it is doing, in a few words, and the stacks of its threads and tasks."""
        turns = 0 if self._engine is None else self._engine.stats().running
        return f"{self._playing} episodes playing, {turns} turns in the engine", stacks()

    async def shutdown(self) -> None:
        """Ends the engine's process."""
        self._scoring.shutdown(wait=False, cancel_futures=True)
        if self._engine is not None:
            await self._engine.shutdown()

    def _ready(self) -> Engine:
        if self._engine is None:
            raise EngineFailed(f"{self.name} has no engine: it has not started")
        return self._engine
