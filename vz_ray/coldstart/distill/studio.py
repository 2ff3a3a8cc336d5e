"""Plays many episodes side by side into a log; what is there already is neither played nor paid for again."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from vz_ray.coldstart.distill.chat import Guide
from vz_ray.coldstart.distill.expert import Expert, ExpertFailed, ExpertPolicy, LimitReached
from vz_ray.coldstart.distill.log import PlayLog
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.data.episode_log import Key
from vz_ray.data.record import EpisodeRecord
from vz_ray.data.task import Task
from vz_ray.episode.protocols import FrameSource, Policy, Prompt
from vz_ray.episode.runner import play
from vz_ray.episode.trajectory import (
    Context,
    EpisodeId,
    Sampled,
    Sampling,
    Status,
    Trajectory,
    Turn,
    Written,
)
from vz_ray.episode.wire import WireFormat
from vz_ray.observe.deadline import Overdue, within
from vz_ray.observe.errors import UserError
from vz_ray.observe.records import turn_to
from vz_ray.reward import score

GIVEN = "given_turns"
"""Key of a trajectory's `extra`: how many of its first turns someone else took."""
SHOW_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Job:
    """One episode to be played.

    Attributes:
        task: The question.
        sample: Which attempt at it.
        given: Turns that are repeated before the expert takes over.
        shown: Digests of all frames shown by then, in order.
    """

    task: Task
    sample: int
    given: tuple[Turn, ...] = ()
    shown: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        return (self.task.task_id, self.sample)

    @property
    def id(self) -> EpisodeId:
        """What its episode is called."""
        return EpisodeId(0, *self.key)


class OtherFrames(Exception):
    """A video does not show what it showed when the given turns were played."""


class TakingOver:
    """A `Policy` that repeats the given turns and then hands over."""

    def __init__(self, job: Job, then: Policy) -> None:
        self._job, self._then = job, then

    async def act(self, prompt: Prompt, sampling: Sampling, *, request: str) -> Sampled | Written:
        given = self._job.given
        turn = sum(message.role == "assistant" for message in prompt.messages)
        if turn < len(given):
            return given[turn].action
        if given and turn == len(given) and tuple(f.ref.digest for f in prompt.frames) != self._job.shown:
            raise OtherFrames(f"{self._job.task.video} shows other frames than when it was played")
        return await self._then.act(prompt, sampling, request=request)


@dataclass
class Studio:
    """All that playing takes.

    Attributes:
        expert: Who plays.
        wire: Writes the episodes.
        frames: Where frames come from.
        episode: What an episode may do.
        reward: How it is scored.
        guide: What the expert alone is told.
        stage: Name of what is played.
    """

    expert: Expert
    wire: WireFormat
    frames: FrameSource
    episode: EpisodeConfig
    reward: RewardConfig
    guide: Guide
    stage: str

    async def play_all(
        self,
        jobs: Sequence[Job],
        log: PlayLog,
        *,
        at_once: int,
        advance: Callable[[int], None] = lambda _: None,
        show: Callable[[Mapping[str, float]], None] = lambda _: None,
    ) -> None:
        """Plays the jobs that `log` does not hold yet.

        Raises:
            LimitReached: The next request could pass the cost limit; what is played is in the log.
            UserError: The expert refuses, or failed `give_up_after` times in a row.
            StopRequested: The expert's `check` raised it.
        """
        done = log.done
        left = deque(job for job in jobs if job.key not in done)
        advance(len(jobs) - len(left))
        progress = _Progress(self.expert, len(left), advance, show)
        players = [self._player(left, log, progress) for _ in range(min(at_once, len(left)))]
        ended = await asyncio.gather(*players, return_exceptions=True)
        raised = [error for error in ended if isinstance(error, BaseException)]
        # A limit is what is left to say where there is nothing worse.
        for error in sorted(raised, key=lambda error: isinstance(error, LimitReached)):
            raise error

    async def _player(self, left: deque[Job], log: PlayLog, progress: _Progress) -> None:
        try:
            while left:
                job = left.popleft()
                turn_to(episode=str(job.id))
                record = await self.play(job)
                log.append(record)
                progress.played(record)
        except BaseException:
            left.clear()
            raise

    async def play(self, job: Job) -> EpisodeRecord:
        """One episode, scored; a failure of expert or video is a FAILED one."""
        config, model = self.expert.config, f"expert {self.expert.config.model}"
        id = job.id
        policy = TakingOver(job, ExpertPolicy(self.expert, self.wire, self.guide, after=len(job.given)))
        sampling = Sampling(config.temperature, config.top_p, self.episode.max_turn_tokens)
        playing = play(job.task, policy, self.frames, self.wire, self.episode, id=id, sampling=sampling)
        began = time.monotonic()
        try:
            played = await within(config.episode_s, playing, who=model, what=f"episode {id}")
            parts = await within(
                self.reward.deadline_s,
                asyncio.to_thread(score, played, job.task, self.reward),
                who="the scorer",
                what=f"episode {id}",
            )
        except (ExpertFailed, OtherFrames, Overdue) as error:
            kind = f"expert {error.reason}" if isinstance(error, ExpertFailed) else type(error).__name__
            return self._failed(job, id, f"{kind}: {error}", time.monotonic() - began)
        played = replace(played, worker=config.model, reward=parts, extra={GIVEN: len(job.given)})
        return EpisodeRecord(job.task, played, self.stage)

    def _failed(self, job: Job, id: EpisodeId, error: str, seconds: float) -> EpisodeRecord:
        name, nothing = self.expert.config.model, Context(())
        lost = Trajectory(
            id, self.wire.name, nothing, (), Status.FAILED, worker=name, seconds=seconds, error=error
        )
        return EpisodeRecord(job.task, lost, self.stage)


class _Progress:
    """Counts what is played, tells a person, and gives up on an expert that only fails."""

    def __init__(
        self,
        expert: Expert,
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
        failed = trajectory.status is Status.FAILED
        self._played += 1
        self._failed += failed
        self._right += trajectory.reward is not None and trajectory.reward.accuracy == 1
        self._in_a_row = self._in_a_row + 1 if failed and trajectory.error.startswith("expert ") else 0
        self._advance(1)
        now = time.monotonic()
        if now - self._shown >= SHOW_EVERY_S or self._played == self._total:
            self._shown = now
            minutes = (now - self._began) / self._played * (self._total - self._played) / 60
            spent = self._expert.account.spent
            self._show(
                {
                    "right": self._right / self._played,
                    "failed": self._failed,
                    "usd": spent.usd + spent.unsure_usd,
                    "minutes left": minutes,
                }
            )
        if self._in_a_row >= self._expert.config.give_up_after:
            raise UserError(
                f"{self._in_a_row} episodes in a row failed because of the expert, the last with "
                f"{trajectory.error}; see to it, then run the same command again"
            )
