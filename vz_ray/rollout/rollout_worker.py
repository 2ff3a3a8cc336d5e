"""Rollout worker: one engine that runs many episodes concurrently.

In production it is a Ray actor. The class does not import Ray, so it runs in any process.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import psutil
from blake3 import blake3

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.decode import DecodeClientStats, DecodePool
from vz_ray.decode.admission import request_owner
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.frame_selectors import create_frame_selector
from vz_ray.env.protocols import FrameRanker, FrameSource
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, RewardParts, SamplingParams, Trajectory
from vz_ray.monitoring.log_context import RunIdentity, log_context
from vz_ray.monitoring.logging_config import configure_actor_logging, redirect_output
from vz_ray.rollout.engine_stats import EngineStats, WorkerCapacity
from vz_ray.rollout.turn_log import TurnLog
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.rollout.vllm_process import EngineFailedError
from vz_ray.utils.stack_dump import format_stacks
from vz_ray.utils.timeouts import with_timeout

REWARD_SECONDS_KEY = "reward_s"
"""Key in `Trajectory.extra` for the scoring time in seconds."""

Scorer = Callable[[Trajectory, Task, RewardConfig], RewardParts]
"""Score a trajectory. It may block on a judge, so it runs in a thread."""


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """Settings shared by all workers of a pool.

    Attributes:
        model: Checkpoint directory, readable on the worker's node.
        rollout: Engine settings, concurrency, timeouts.
        episode: Default episode config.
        reward: Passed to `scorer`.
        frame_source: Decodes overviews and clips.
        scorer: Scores each finished episode.
        log_dir: Directory for `<worker>.log` and `<worker>.engine.log`.
        version: Weight version of `model`.
        transport: Weight transport: `shm`, `nccl` or `ipc`.
        gpu_share: Fraction of a GPU that each engine requests, per GPU of the engine.
        colocate: Engines sleep while the learner uses their GPUs.
        training: Reject sampling parameters that cannot be trained on.
        ranker: Image-text model of the frame selector `query`.
        run_identity: Run name and log format for the worker's log lines.
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
    gpu_share: float = 1.0
    colocate: bool = False
    training: bool = True
    ranker: FrameRanker | None = None
    run_identity: RunIdentity = RunIdentity()  # noqa: RUF009 - frozen


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """Counters of a worker since its start.

    Attributes:
        name: Name of the worker.
        pid: Process id of the worker.
        weight_version: Current weight version.
        running_episodes: Episodes that hold a slot now.
        finished_episodes: Episodes finished.
        worker_memory_bytes: Resident memory of the worker process.
        engine_memory_bytes: Resident memory of its child processes.
        engine: Counters of the engine.
        decode_stats: Counters of the worker's decode client.
    """

    name: str
    pid: int
    weight_version: int
    running_episodes: int
    finished_episodes: int
    worker_memory_bytes: int
    engine_memory_bytes: int
    engine: EngineStats
    decode_stats: DecodeClientStats = DecodeClientStats()  # noqa: RUF009 - frozen


def sample_seed(seed: int | None, episode_id: EpisodeId) -> int | None:
    """Derive the seed of a sample, equal for all its attempts. Without a `seed`, return None."""
    if seed is None:
        return None
    return int.from_bytes(blake3(f"{seed}|{episode_id.sample_key}".encode()).digest(4), "big") >> 1


def _rss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0  # the process has exited


class RolloutWorker:
    """Run episodes with one engine. Errors name the worker.

    Args:
        name: Name of the worker.
        setup: Shared settings.
        own_process: Redirect output and logging of this process to the worker's log file.
    """

    engine_type: ClassVar[type[VllmEngine]] = VllmEngine

    def __init__(self, name: str, setup: WorkerSetup, *, own_process: bool = True) -> None:
        self.name = name
        self._setup = setup
        self._engine: VllmEngine | None = None
        self._chat_formats: dict[tuple[str, ...], ChatFormat] = {}
        self._slots = asyncio.Semaphore(setup.rollout.max_concurrent_episodes)
        self._running_episodes = 0
        self._finished_episodes = 0
        self._turns = TurnLog()
        # Episodes that wait for a judge hold no slot, so there may be more of them than running ones.
        self._scorer_threads = ThreadPoolExecutor(2 * setup.rollout.max_concurrent_episodes, thread_name_prefix="score")
        if own_process:
            redirect_output(Path(setup.log_dir) / f"{name}.log")
            configure_actor_logging(name, setup.run_identity)

    async def start(self) -> None:
        """Start the engine.

        Raises:
            UserError: The frame selector, the checkpoint or the chat format is invalid.
            StepTimeout: The engine did not start in time.
        """
        setup, config = self._setup, self._setup.rollout
        # Fail before the engine starts.
        create_frame_selector(setup.episode.selector, setup.ranker)
        self._chat_format(setup.episode)
        self._engine = await self.engine_type.start(
            setup.model,
            config.engine,
            name=self.name,
            log_file=Path(setup.log_dir) / f"{self.name}.engine.log",
            version=setup.version,
            transport=setup.transport,
            can_sleep=setup.colocate,
            training=setup.training,
            start_timeout_s=config.start_timeout_s,
            turn_timeout_s=config.turn_timeout_s,
        )

    async def run_episode(
        self,
        task: Task,
        episode_id: EpisodeId,
        sampling_params: SamplingParams,
        episode_config: EpisodeConfig | None = None,
        completed_turns: bytes = b"",
    ) -> Trajectory:
        """Run and score one episode.

        Args:
            episode_config: Overrides the worker's default.
            completed_turns: Turns of an attempt that was interrupted, from `read_completed_turns`.

        Raises:
            StepTimeout: The episode, a turn, a clip or the reward exceeded its timeout.
            EngineFailedError: The engine is unusable.
        """
        with log_context(step=episode_id.step, episode=str(episode_id)):
            trajectory = await self._run_in_slot(
                task, episode_id, sampling_params, episode_config or self._setup.episode, completed_turns
            )
            return await self._score(trajectory, task)

    def read_completed_turns(self) -> dict[EpisodeId, bytes]:
        """Return the turns of each running episode that completed one since the last call; see `TurnLog`."""
        return self._turns.take_changed()

    async def _run_in_slot(
        self,
        task: Task,
        episode_id: EpisodeId,
        sampling_params: SamplingParams,
        config: EpisodeConfig,
        completed_turns: bytes,
    ) -> Trajectory:
        setup, engine, chat_format = self._setup, self._require_engine(), self._chat_format(config)
        async with self._slots:
            self._running_episodes += 1
            try:
                episode = run_episode(
                    task,
                    engine,
                    setup.frame_source,
                    chat_format,
                    config,
                    episode_id=episode_id,
                    sampling_params=replace(sampling_params, seed=sample_seed(sampling_params.seed, episode_id)),
                    worker=self.name,
                    ranker=setup.ranker,
                    on_event=self._turns.recorder(episode_id),
                    completed_turns=TurnLog.decode(completed_turns),
                )
                with request_owner(str(episode_id)):
                    trajectory = await with_timeout(
                        episode,
                        setup.rollout.episode_timeout_s,
                        target=self.name,
                        operation=f"episode {episode_id}",
                    )
            finally:
                self._running_episodes -= 1
                self._turns.discard(episode_id)
        self._finished_episodes += 1
        return trajectory

    async def _score(self, trajectory: Trajectory, task: Task) -> Trajectory:
        setup, started_at = self._setup, time.monotonic()
        score = asyncio.get_running_loop().run_in_executor(
            self._scorer_threads, setup.scorer, trajectory, task, setup.reward
        )
        reward = await with_timeout(
            score, setup.reward.timeout_s, target=self.name, operation=f"the reward of {trajectory.id}"
        )
        extra = {**trajectory.extra, REWARD_SECONDS_KEY: round(time.monotonic() - started_at, 6)}
        return replace(trajectory, reward=reward, extra=extra)

    def _chat_format(self, config: EpisodeConfig) -> ChatFormat:
        """Return the cached chat format of an episode config."""
        key = (config.prompt, config.chat_format, config.thinking)
        if key not in self._chat_formats:
            self._chat_formats[key] = load_chat_format(self._setup.model, config)
        return self._chat_formats[key]

    async def call_engine(self, method: str, *args: Any) -> Any:
        """Call a method of the engine; see `EngineClient`."""
        return await getattr(self._require_engine(), method)(*args)

    async def check_health(self) -> WorkerCapacity:
        """Return the remaining capacity.

        Raises:
            EngineFailedError: The engine process has died.
        """
        await self._require_engine().check_health()
        return self.capacity()

    def capacity(self) -> WorkerCapacity:
        """Return the remaining capacity."""
        stats = self._require_engine().stats()
        return WorkerCapacity(stats.kv_cache_tokens - stats.kv_cache_used_tokens, self._running_episodes)

    async def worker_stats(self) -> WorkerStats:
        engine, process = self._require_engine(), psutil.Process()
        frame_source = self._setup.frame_source
        return WorkerStats(
            name=self.name,
            pid=os.getpid(),
            weight_version=engine.version,
            running_episodes=self._running_episodes,
            finished_episodes=self._finished_episodes,
            worker_memory_bytes=_rss_bytes(process),
            engine_memory_bytes=sum(map(_rss_bytes, process.children(recursive=True))),
            engine=engine.stats(),
            decode_stats=(frame_source.client_stats() if isinstance(frame_source, DecodePool) else DecodeClientStats()),
        )

    async def describe_state(self) -> tuple[str, str]:
        """Return a one-line summary of the current work, and the stacks of all threads and tasks."""
        turns = 0 if self._engine is None else self._engine.stats().running_turns
        return f"{self._running_episodes} episodes running, {turns} turns in the engine", format_stacks()

    async def shutdown(self) -> None:
        """Shut the engine down."""
        self._scorer_threads.shutdown(wait=False, cancel_futures=True)
        if self._engine is not None:
            await self._engine.shutdown()

    def _require_engine(self) -> VllmEngine:
        if self._engine is None:
            raise EngineFailedError(f"{self.name} has no engine; call start() first")
        return self._engine
