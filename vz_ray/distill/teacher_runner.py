"""Plays many episodes side by side into a log; what is there already is neither played nor paid for again."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.data.episode_log import EpisodeKey
from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.distill.chat_messages import TeacherPrompt
from vz_ray.distill.distillation_log import DistillationLog
from vz_ray.distill.teacher_client import CostLimitReached, TeacherClient, TeacherError, TeacherPolicy
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.protocols import FrameSource, Policy, Prompt
from vz_ray.env.task import Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    SampledAction,
    SamplingParams,
    TokenContext,
    Trajectory,
    Turn,
)
from vz_ray.monitoring.log_context import set_log_context
from vz_ray.rewards import score_episode
from vz_ray.utils.errors import UserError
from vz_ray.utils.timeouts import StepTimeout, with_timeout

PREFIX_TURNS = "prefix_turns"
"""Key of a trajectory's `extra`: how many of its first turns someone else took."""
REPORT_INTERVAL_S = 5.0


@dataclass(frozen=True, slots=True)
class TeacherJob:
    """One episode to be played.

    Attributes:
        task: The question.
        sample: Which attempt at it.
        prefix_turns: Turns that are repeated before the expert takes over.
        prefix_frame_digests: Digests of all frames shown by then, in order.
    """

    task: Task
    sample: int
    prefix_turns: tuple[Turn, ...] = ()
    prefix_frame_digests: tuple[str, ...] = ()

    @property
    def key(self) -> EpisodeKey:
        return (self.task.task_id, self.sample)

    @property
    def episode_id(self) -> EpisodeId:
        """What its episode is called."""
        return EpisodeId(0, *self.key)


class FramesChangedError(Exception):
    """A video does not show what it showed when the given turns were played."""


class PrefixReplay:
    """A `PolicyModel` that repeats the given turns and then hands over."""

    def __init__(self, job: TeacherJob, then: Policy) -> None:
        self._job, self._then = job, then

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str
    ) -> SampledAction | ExternalAction:
        given = self._job.prefix_turns
        turn = sum(message.role == "assistant" for message in prompt.messages)
        if turn < len(given):
            return given[turn].action
        if (
            given
            and turn == len(given)
            and tuple(f.ref.digest for f in prompt.frames) != self._job.prefix_frame_digests
        ):
            raise FramesChangedError(f"{self._job.task.video} shows other frames than when it was played")
        return await self._then.generate(prompt, sampling_params, request_id=request_id)


@dataclass
class TeacherRunner:
    """All that playing takes.

    Attributes:
        teacher: Who plays.
        chat_format: Writes the episodes.
        frames: Where frames come from.
        episode: What an episode may do.
        reward: How it is scored.
        prompt: What the expert alone is told.
        stage: Name of what is played.
    """

    teacher: TeacherClient
    chat_format: ChatFormat
    frames: FrameSource
    episode: EpisodeConfig
    reward: RewardConfig
    prompt: TeacherPrompt
    stage: str

    async def run_jobs(
        self,
        jobs: Sequence[TeacherJob],
        log: DistillationLog,
        *,
        max_concurrent: int,
        advance: Callable[[int], None] = lambda _: None,
        report: Callable[[Mapping[str, float]], None] = lambda _: None,
    ) -> None:
        """Plays the jobs that `log` does not hold yet.

        Raises:
            LimitReached: The next request could pass the cost limit; what is played is in the log.
            UserError: The expert refuses, or failed `give_up_after` times in a row.
            StopRequested: The expert's `check` raised it.
        """
        done = log.completed
        left = deque(job for job in jobs if job.key not in done)
        advance(len(jobs) - len(left))
        progress = _DistillationProgress(self.teacher, len(left), advance, report)
        players = [self._player(left, log, progress) for _ in range(min(max_concurrent, len(left)))]
        ended = await asyncio.gather(*players, return_exceptions=True)
        raised = [error for error in ended if isinstance(error, BaseException)]
        # A limit is what is left to say where there is nothing worse.
        for error in sorted(raised, key=lambda error: isinstance(error, CostLimitReached)):
            raise error

    async def _player(
        self, left: deque[TeacherJob], log: DistillationLog, progress: _DistillationProgress
    ) -> None:
        try:
            while left:
                job = left.popleft()
                set_log_context(episode=str(job.episode_id))
                record = await self.run_job(job)
                log.append(record)
                progress.played(record)
        except BaseException:
            left.clear()
            raise

    async def run_job(self, job: TeacherJob) -> EpisodeRecord:
        """One episode, scored; a failure of expert or video is a FAILED one."""
        config, model = self.teacher.config, f"expert {self.teacher.config.model}"
        id = job.episode_id
        policy = PrefixReplay(
            job,
            TeacherPolicy(self.teacher, self.chat_format, self.prompt, prefix_turns=len(job.prefix_turns)),
        )
        sampling = SamplingParams(config.temperature, config.top_p, self.episode.max_turn_tokens)
        playing = run_episode(
            job.task,
            policy,
            self.frames,
            self.chat_format,
            self.episode,
            episode_id=id,
            sampling_params=sampling,
        )
        began = time.monotonic()
        try:
            played = await with_timeout(
                playing, config.episode_timeout_s, target=model, operation=f"episode {id}"
            )
            parts = await with_timeout(
                asyncio.to_thread(score_episode, played, job.task, self.reward),
                self.reward.timeout_s,
                target="the scorer",
                operation=f"episode {id}",
            )
        except (TeacherError, FramesChangedError, StepTimeout) as error:
            kind = f"expert {error.reason}" if isinstance(error, TeacherError) else type(error).__name__
            return self._failed(job, id, f"{kind}: {error}", time.monotonic() - began)
        played = replace(
            played, worker=config.model, reward=parts, extra={PREFIX_TURNS: len(job.prefix_turns)}
        )
        return EpisodeRecord(job.task, played, self.stage)

    def _failed(self, job: TeacherJob, id: EpisodeId, error: str, seconds: float) -> EpisodeRecord:
        name, nothing = self.teacher.config.model, TokenContext(())
        lost = Trajectory(
            id,
            self.chat_format.name,
            nothing,
            (),
            EpisodeStatus.FAILED,
            worker=name,
            seconds=seconds,
            error=error,
        )
        return EpisodeRecord(job.task, lost, self.stage)


class _DistillationProgress:
    """Counts what is played, tells a person, and gives up on an expert that only fails."""

    def __init__(
        self,
        expert: TeacherClient,
        total: int,
        advance: Callable[[int], None],
        show: Callable[[Mapping[str, float]], None],
    ) -> None:
        self._expert, self._total = expert, total
        self._advance, self._show = advance, show
        self._played = self._right = self._failed = self._in_a_row = 0
        self._began = self._shown = time.monotonic()

    def played(self, record: EpisodeRecord) -> None:
        trajectory = record.trajectory
        failed = trajectory.status is EpisodeStatus.FAILED
        self._played += 1
        self._failed += failed
        self._right += trajectory.reward is not None and trajectory.reward.accuracy == 1
        self._in_a_row = self._in_a_row + 1 if failed and trajectory.error.startswith("expert ") else 0
        self._advance(1)
        now = time.monotonic()
        if now - self._shown >= REPORT_INTERVAL_S or self._played == self._total:
            self._shown = now
            minutes = (now - self._began) / self._played * (self._total - self._played) / 60
            spent = self._expert.ledger.totals
            self._show(
                {
                    "right": self._right / self._played,
                    "failed": self._failed,
                    "usd": spent.cost_usd + spent.reserved_usd,
                    "minutes left": minutes,
                }
            )
        if self._in_a_row >= self._expert.config.max_consecutive_failures:
            raise UserError(
                f"{self._in_a_row} episodes in a row failed because of the expert, the last with "
                f"{trajectory.error}; see to it, then run the same command again"
            )
