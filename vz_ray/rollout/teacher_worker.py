"""Teacher worker: an engine as a Ray actor that scores the student's groups."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from vz_ray.env.trajectory import Trajectory
from vz_ray.rollout.ray_worker import RayWorkerClient, RolloutWorkerActor
from vz_ray.rollout.rollout_worker import WorkerSetup
from vz_ray.rollout.scoring_engine import ScoringEngine
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.frame import Frame, FrameRef

Logprobs = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TeacherSetup(WorkerSetup):
    """Settings shared by all teacher workers; `model` is the teacher's checkpoint.

    Attributes:
        temperature: Sampling temperature of the student.
    """

    temperature: float = 1.0


class TeacherWorkerActor(RolloutWorkerActor):
    """Worker with a `ScoringEngine`."""

    engine_type: ClassVar[type[VllmEngine]] = ScoringEngine

    async def start(self) -> None:
        """Start the engine; see `RolloutWorker.start`."""
        await super().start()
        assert isinstance(self._setup, TeacherSetup)
        await self._scoring_engine().set_temperature(self._setup.temperature)

    async def score(self, trajectories: Sequence[Trajectory]) -> list[Logprobs]:
        """Return the teacher's log-probs of each trajectory's sampled tokens, `[S]` each.

        Raises:
            VideoError: A frame cannot be decoded again.
            StepTimeout: The frames, or one trajectory, exceeded the timeout.
            ValueError: See `ScoringEngine.score`.
            EngineFailedError: The engine is unusable.
        """
        setup, refs = self._setup, dict.fromkeys(ref for t in trajectories for ref in t.frame_refs)
        resolved = await with_timeout(
            setup.frame_source.resolve(list(refs)),
            setup.rollout.episode_timeout_s,
            target="decode pool",
            operation=f"{len(refs)} frames for {self.name}",
        )
        frames = dict(zip(refs, resolved, strict=True))
        return await asyncio.gather(*(self._score_trajectory(trajectory, frames) for trajectory in trajectories))

    async def _score_trajectory(self, trajectory: Trajectory, frames: Mapping[FrameRef, Frame]) -> Logprobs:
        async with self._slots:
            return await self._scoring_engine().score(trajectory, [frames[ref] for ref in trajectory.frame_refs])

    def _scoring_engine(self) -> ScoringEngine:
        engine = self._require_engine()
        assert isinstance(engine, ScoringEngine)
        return engine


class TeacherWorkerClient(RayWorkerClient):
    """Client of a teacher worker."""

    actor_type: ClassVar[type[RolloutWorkerActor]] = TeacherWorkerActor
    section: ClassVar[str] = "teacher"

    async def score(self, trajectories: Sequence[Trajectory]) -> list[Logprobs]:
        """See `TeacherWorkerActor.score`."""
        scores: list[Logprobs] = await self._call("score", trajectories)
        return scores
