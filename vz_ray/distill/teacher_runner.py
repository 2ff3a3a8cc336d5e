"""Runner of teacher episodes: concurrent, and resumable through the log and the cost ledger."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.data.episode_log import EpisodeKey, EpisodeLog, episode_key
from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.distill.chat_messages import TeacherPrompt
from vz_ray.distill.teacher_client import CostLimitReached, TeacherClient, TeacherPolicy
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
from vz_ray.utils.openai_endpoint import EndpointError
from vz_ray.utils.timeouts import StepTimeout, with_timeout

PREFIX_TURNS = "prefix_turns"
"""Key in `Trajectory.extra`: number of leading turns that the policy generated."""
REPORT_INTERVAL_S = 5.0
_TEACHER_FAILURE = "teacher "
"""Prefix of `Trajectory.error` if the teacher caused the failure."""


@dataclass(frozen=True, slots=True)
class TeacherJob:
    """One episode to run.

    Attributes:
        task: The task.
        sample: Index of the attempt.
        prefix_turns: Turns to replay before the teacher takes over.
        prefix_frame_digests: Digests of all frames up to that point, in order.
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
        return EpisodeId(0, *self.key)


class DistillationLog(EpisodeLog):
    """Log of teacher episodes; the sample index is the attempt at the task."""

    header_key: ClassVar[str] = "distillation"
    mismatch_hint: ClassVar[str] = "choose another name, or delete the log (paid replies are reused)"

    @property
    def records(self) -> list[EpisodeRecord]:
        """Episodes ordered by task and attempt, independent of the order of completion."""
        return sorted(super().records, key=episode_key)


class FramesChangedError(Exception):
    """A video yields other frames than in the recorded prefix."""


class PrefixReplay:
    """`Policy` that replays the prefix turns of a job, then delegates to another policy."""

    def __init__(self, job: TeacherJob, policy: Policy) -> None:
        self._job, self._policy = job, policy

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str
    ) -> SampledAction | ExternalAction:
        prefix = self._job.prefix_turns
        turn = sum(message.role == "assistant" for message in prompt.messages)
        if turn < len(prefix):
            return prefix[turn].action
        if prefix and turn == len(prefix):
            digests = tuple(frame.ref.digest for frame in prompt.frames)
            if digests != self._job.prefix_frame_digests:
                raise FramesChangedError(f"{self._job.task.video} yields other frames than in the recording")
        return await self._policy.generate(prompt, sampling_params, request_id=request_id)


@dataclass
class TeacherRunner:
    """Runs and scores teacher episodes.

    Attributes:
        teacher: Client of the teacher.
        chat_format: Encodes the episodes.
        frames: Source of the frames.
        episode: Limits of an episode.
        reward: Scoring of the episodes.
        prompt: Additional instructions for the teacher.
        stage: Name of the stage in the records.
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
        """Run the jobs that `log` does not contain yet.

        Args:
            jobs: All episodes of the run.
            log: Receives each finished episode.
            max_concurrent: Maximum concurrent episodes.
            advance: Callback with the number of episodes finished since the last call.
            report: Callback with running statistics.

        Raises:
            CostLimitReached: The next request could exceed the budget. Finished episodes are in the log.
            UserError: The teacher rejects requests, or failed `max_consecutive_failures` times.
            StopRequested: Raised by the `check` callback of the client.
        """
        completed = log.completed
        queue = deque(job for job in jobs if job.key not in completed)
        advance(len(jobs) - len(queue))
        progress = _DistillationProgress(self.teacher, len(queue), advance, report)
        workers = [self._work(queue, log, progress) for _ in range(min(max_concurrent, len(queue)))]
        results = await asyncio.gather(*workers, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        # Any other error takes precedence over the cost limit.
        for error in sorted(errors, key=lambda error: isinstance(error, CostLimitReached)):
            raise error

    async def _work(self, queue: deque[TeacherJob], log: DistillationLog, progress: _DistillationProgress) -> None:
        try:
            while queue:
                job = queue.popleft()
                set_log_context(episode=str(job.episode_id))
                record = await self.run_job(job)
                log.append(record)
                progress.on_episode(record)
        except BaseException:
            queue.clear()
            raise

    async def run_job(self, job: TeacherJob) -> EpisodeRecord:
        """Run and score one episode. Failures of the teacher or the video give the status FAILED."""
        config, episode_id = self.teacher.config, job.episode_id
        prefix_turns = len(job.prefix_turns)
        teacher_policy = TeacherPolicy(self.teacher, self.chat_format, self.prompt, prefix_turns=prefix_turns)
        episode = run_episode(
            job.task,
            PrefixReplay(job, teacher_policy),
            self.frames,
            self.chat_format,
            self.episode,
            episode_id=episode_id,
            sampling_params=SamplingParams(config.temperature, config.top_p, self.episode.max_turn_tokens),
        )
        start_s = time.monotonic()
        operation = f"episode {episode_id}"
        try:
            trajectory = await with_timeout(
                episode, config.episode_timeout_s, target=f"teacher {config.model}", operation=operation
            )
            parts = await with_timeout(
                asyncio.to_thread(score_episode, trajectory, job.task, self.reward),
                self.reward.timeout_s,
                target="the scorer",
                operation=operation,
            )
        except (EndpointError, FramesChangedError, StepTimeout) as error:
            reason = f"{_TEACHER_FAILURE}{error.reason}" if isinstance(error, EndpointError) else type(error).__name__
            return self._failed_record(job, f"{reason}: {error}", time.monotonic() - start_s)
        trajectory = replace(trajectory, worker=config.model, reward=parts, extra={PREFIX_TURNS: prefix_turns})
        return EpisodeRecord(job.task, trajectory, self.stage)

    def _failed_record(self, job: TeacherJob, error: str, seconds: float) -> EpisodeRecord:
        trajectory = Trajectory(
            job.episode_id,
            self.chat_format.name,
            TokenContext(()),
            (),
            EpisodeStatus.FAILED,
            worker=self.teacher.config.model,
            seconds=seconds,
            error=error,
        )
        return EpisodeRecord(job.task, trajectory, self.stage)


class _DistillationProgress:
    """Running statistics. Stops the run after too many consecutive teacher failures."""

    def __init__(
        self,
        teacher: TeacherClient,
        total: int,
        advance: Callable[[int], None],
        report: Callable[[Mapping[str, float]], None],
    ) -> None:
        self._teacher, self._total = teacher, total
        self._advance, self._report = advance, report
        self._finished = self._correct = self._failed = self._consecutive_failures = 0
        self._start_s = self._last_report_s = time.monotonic()

    def on_episode(self, record: EpisodeRecord) -> None:
        trajectory = record.trajectory
        failed = trajectory.status is EpisodeStatus.FAILED
        self._finished += 1
        self._failed += failed
        self._correct += trajectory.reward is not None and trajectory.reward.accuracy == 1
        if failed and trajectory.error.startswith(_TEACHER_FAILURE):
            self._consecutive_failures += 1
        else:
            self._consecutive_failures = 0
        self._advance(1)
        now_s = time.monotonic()
        if now_s - self._last_report_s >= REPORT_INTERVAL_S or self._finished == self._total:
            self._last_report_s = now_s
            self._report(self._statistics(now_s))
        if self._consecutive_failures >= self._teacher.config.max_consecutive_failures:
            raise UserError(
                f"{self._consecutive_failures} episodes in a row failed because of the teacher "
                f"(teacher.max_consecutive_failures); last error: {trajectory.error}. "
                "Fix the endpoint, then run the same command again to resume."
            )

    def _statistics(self, now_s: float) -> dict[str, float]:
        seconds_per_episode = (now_s - self._start_s) / self._finished
        totals = self._teacher.ledger.totals
        return {
            "correct": self._correct / self._finished,
            "failed": self._failed,
            "usd": totals.cost_usd + totals.reserved_usd,
            "minutes left": seconds_per_episode * (self._total - self._finished) / 60,
        }
