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

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.decode import DecodeClientStats, DecodePool
from vz_ray.decode.admission import request_owner
from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.frame_selectors import create_frame_selector
from vz_ray.env.protocols import FrameRanker, FrameSource
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, RewardParts, SamplingParams, Trajectory
from vz_ray.monitoring.log_context import RunIdentity, log_context
from vz_ray.monitoring.logging_config import configure_actor_logging, redirect_output
from vz_ray.rollout.engine_stats import EngineStats, WorkerCapacity
from vz_ray.rollout.vllm_engine import EngineFailedError, VllmEngine
from vz_ray.utils.stack_dump import format_stacks
from vz_ray.utils.timeouts import with_timeout
from vz_ray.weight_sync import ParityProbe, WeightUpdate

REWARD_SECONDS_KEY = "reward_s"
"""Under which `Trajectory.extra` holds the seconds that scoring took."""

Scorer = Callable[[Trajectory, Task, RewardConfig], RewardParts]
"""May block, while a judge is asked: it is called in a thread."""


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What every worker of a fleet is made from.

    Attributes:
        model: Checkpoint directory, readable on the worker's node.
        version: Weight version of that checkpoint.
        frame_source: Where clips come from.
        scorer: Scores each finished episode.
        log_dir: Directory for `<worker>.log` and `<worker>.engine.log`.
        transport: How weights come: `shm` or `nccl`.
        training: Refuse to sample what cannot be trained on.
        ranker: The image-text model, for episodes whose frames are chosen with it.
        badge: Which run it logs for, and how.
    """

    model: str
    rollout: RolloutConfig
    episode: EpisodeConfig
    reward: RewardConfig
    frame_source: FrameSource
    scorer: Scorer
    log_dir: str
    version: int = 0
    transport: str = "shm"
    training: bool = True
    ranker: FrameRanker | None = None
    badge: RunIdentity = RunIdentity()  # noqa: RUF009 - frozen


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """A worker's counts since its start.

    Attributes:
        running_episodes: Episodes at this moment.
        finished_episodes: Episodes finished.
        pid: Of the worker's own process.
        worker_memory_mb: Resident memory of that process.
        engine_memory_mb: Resident memory of the processes that it has started.
        decode_stats: What its handle of the clip pool does.
    """

    name: str
    pid: int
    weight_version: int
    running_episodes: int
    finished_episodes: int
    worker_memory_mb: float
    engine_memory_mb: float
    engine: EngineStats
    decode_stats: DecodeClientStats = DecodeClientStats()  # noqa: RUF009 - frozen


def sample_seed(seed: int | None, episode_id: EpisodeId) -> int | None:
    """A seed of its own for each sample, the same for each attempt at it; None stays None."""
    if seed is None:
        return None
    return int.from_bytes(blake3(f"{seed}|{episode_id.sample_key}".encode()).digest(4), "big") >> 1


def _rss_mb(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / 1e6
    except psutil.Error:
        return 0.0  # it has ended


class RolloutWorker:
    """Plays episodes with its own engine; every method names this worker in its errors."""

    engine_type: ClassVar[type[VllmEngine]] = VllmEngine

    def __init__(self, name: str, setup: WorkerSetup, *, own_process: bool = True) -> None:
        self.name = name
        self._setup = setup
        self._engine: VllmEngine | None = None
        self._chat_formats: dict[tuple[str, str], ChatFormat] = {}
        self._slots = asyncio.Semaphore(setup.rollout.max_concurrent_episodes)
        self._running_episodes = 0
        self._finished_episodes = 0
        # Episodes that wait for a judge keep no place, so there may be more of them than play.
        self._scorer_threads = ThreadPoolExecutor(
            2 * setup.rollout.max_concurrent_episodes, thread_name_prefix="score"
        )
        if own_process:
            redirect_output(Path(setup.log_dir) / f"{name}.log")
            configure_actor_logging(name, setup.badge)

    async def start(self) -> None:
        """Starts the engine."""
        from transformers import AutoTokenizer

        setup, config = self._setup, self._setup.rollout
        create_frame_selector(
            setup.episode.selector, setup.ranker
        )  # what it lacks is said before an engine starts
        self._engine = await self.engine_type.start(
            setup.model,
            config.engine,
            name=self.name,
            log_file=Path(setup.log_dir) / f"{self.name}.engine.log",
            version=setup.version,
            transport=setup.transport,
            training=setup.training,
            start_timeout_s=config.start_timeout_s,
            turn_timeout_s=config.turn_timeout_s,
        )
        self._tokenizer = AutoTokenizer.from_pretrained(setup.model, trust_remote_code=False)
        self._chat_format(setup.episode)

    async def run_episode(
        self,
        task: Task,
        episode_id: EpisodeId,
        sampling_params: SamplingParams,
        episode_config: EpisodeConfig | None = None,
    ) -> Trajectory:
        """Plays and scores one episode, by the rules of `episode_config` or its own.

        Raises:
            Overdue: It took longer than the episode deadline, or a turn or clip than its own.
            EngineFailed: The engine is of no use any more.
        """
        engine, setup = self._engine, self._setup
        if engine is None:
            raise EngineFailedError(
                f"{self.name} was asked to play {episode_id} before its engine had started"
            )
        with log_context(step=episode_id.step, episode=str(episode_id)):
            return await self._run_and_score(
                engine, task, episode_id, sampling_params, episode_config or setup.episode
            )

    async def _run_and_score(
        self, engine: VllmEngine, task: Task, id: EpisodeId, sampling: SamplingParams, rules: EpisodeConfig
    ) -> Trajectory:
        setup, wire = self._setup, self._chat_format(rules)
        async with self._slots:
            self._running_episodes += 1
            try:
                drawn = replace(sampling, seed=sample_seed(sampling.seed, id))
                game = run_episode(
                    task,
                    engine,
                    setup.frame_source,
                    wire,
                    rules,
                    episode_id=id,
                    sampling_params=drawn,
                    worker=self.name,
                    ranker=setup.ranker,
                )
                deadline = setup.rollout.episode_timeout_s
                with request_owner(str(id)):
                    trajectory = await with_timeout(
                        game, deadline, target=self.name, operation=f"episode {id}"
                    )
            finally:
                self._running_episodes -= 1
        self._finished_episodes += 1
        loop, began = asyncio.get_running_loop(), time.monotonic()
        score = loop.run_in_executor(self._scorer_threads, setup.scorer, trajectory, task, setup.reward)
        parts = await with_timeout(
            score, setup.reward.timeout_s, target=self.name, operation=f"the reward of {id}"
        )
        extra = {**trajectory.extra, REWARD_SECONDS_KEY: round(time.monotonic() - began, 6)}
        return replace(trajectory, reward=parts, extra=extra)

    def _chat_format(self, rules: EpisodeConfig) -> ChatFormat:
        """The wire format of these rules; made once for each wording."""
        key = (rules.prompt, rules.chat_format)
        if key not in self._chat_formats:
            wording = PromptTemplate.load(rules.prompt)
            self._chat_formats[key] = ChatFormat(
                self._tokenizer, wording, compat=rules.chat_format == "compat"
            )
        return self._chat_formats[key]

    async def score_probe(self, probe: ParityProbe) -> tuple[float, ...]:
        """The engine's log-probs `[T]` of the probe's tokens."""
        return await self._require_engine().score_probe(probe)

    async def init_weight_transfer(self, info: dict[str, object]) -> None:
        """Connects to the learner (NCCL only)."""
        await self._require_engine().init_weight_transfer(info)

    async def pause(self) -> None:
        await self._require_engine().pause()

    async def receive_weights(self, update: WeightUpdate) -> None:
        await self._require_engine().receive_weights(update)

    async def resume_engine(self) -> None:
        await self._require_engine().resume_engine()

    async def resume(self) -> None:
        await self._require_engine().resume()

    async def check_health(self) -> WorkerCapacity:
        """What it could still take in; raises `EngineFailedError` if the engine's process is gone."""
        await self._require_engine().check_health()
        return self.capacity()

    def capacity(self) -> WorkerCapacity:
        """What it could still take in."""
        stats = self._require_engine().stats()
        return WorkerCapacity(stats.kv_cache_tokens - stats.kv_cache_used_tokens, self._running_episodes)

    async def worker_stats(self) -> WorkerStats:
        engine, process = self._require_engine(), psutil.Process()
        frames = self._setup.frame_source
        below = [_rss_mb(child) for child in process.children(recursive=True)]
        return WorkerStats(
            name=self.name,
            pid=os.getpid(),
            weight_version=engine.version,
            running_episodes=self._running_episodes,
            finished_episodes=self._finished_episodes,
            worker_memory_mb=_rss_mb(process),
            engine_memory_mb=sum(below),
            engine=engine.stats(),
            decode_stats=frames.client_stats() if isinstance(frames, DecodePool) else DecodeClientStats(),
        )

    async def describe_state(self) -> tuple[str, str]:
        """What it is doing, in a few words, and the stacks of its threads and tasks."""
        turns = 0 if self._engine is None else self._engine.stats().running_turns
        return f"{self._running_episodes} episodes playing, {turns} turns in the engine", format_stacks()

    async def shutdown(self) -> None:
        """Ends the engine's process."""
        self._scorer_threads.shutdown(wait=False, cancel_futures=True)
        if self._engine is not None:
            await self._engine.shutdown()

    def _require_engine(self) -> VllmEngine:
        if self._engine is None:
            raise EngineFailedError(f"{self.name} has no engine: it has not started")
        return self._engine
