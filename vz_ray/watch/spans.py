"""An episode as a trace, from the times that its trajectory carries: nothing is measured for it."""

from __future__ import annotations

from vz_ray.episode.trajectory import Status, Trajectory, Turn
from vz_ray.observe.traces import Attributes, Span
from vz_ray.rollout.worker import REWARD_S
from vz_ray.video.frame import Zoom


def episode_span(trajectory: Trajectory, accepted_s: float, run: str) -> Span:
    """Its trace.

        episode
          overview       until the first turn: probing the video, its overview, waiting for a place
          turn 0         generate, clip
          turn 1         generate
          reward

    Args:
        trajectory: With its reward.
        accepted_s: When it was accepted, seconds since the epoch: its end.
        run: Name of the run.
    """
    scoring = trajectory.extra.get(REWARD_S, 0.0)
    reward_s = scoring if isinstance(scoring, float) else 0.0
    over = accepted_s - reward_s
    began = over - trajectory.seconds
    at = over - sum(sum(turn.seconds) for turn in trajectory.turns)
    parts = [Span("overview", began, max(began, at))]
    for number, turn in enumerate(trajectory.turns):
        parts.append(_turn_span(number, turn, at))
        at += sum(turn.seconds)
    if trajectory.reward is not None:
        parts.append(Span("reward", over, accepted_s, _reward(trajectory)))
    failed = trajectory.error if trajectory.status is Status.FAILED else ""
    return Span("episode", began, accepted_s, _episode(trajectory, run), tuple(parts), failed)


def _episode(trajectory: Trajectory, run: str) -> Attributes:
    id = trajectory.id
    return {
        "vz.run": run,
        "vz.episode": str(id),
        "vz.iteration": id.iteration,
        "vz.task": id.task,
        "vz.sample": id.sample,
        "vz.attempt": id.attempt,
        "vz.worker": trajectory.worker,
        "vz.status": trajectory.status.value,
        "vz.tokens": trajectory.length,
        "vz.frames": len(trajectory.refs),
        "vz.weight_version": max(trajectory.weight_versions, default=0),
    }


def _reward(trajectory: Trajectory) -> Attributes:
    parts = trajectory.reward
    if parts is None:
        return {}
    return {
        "vz.reward.total": parts.total,
        "vz.reward.accuracy": parts.accuracy,
        "vz.reward.format": parts.format,
        "vz.reward.tool": parts.tool,
        "vz.reward.valid": parts.valid,
    }


def _turn_span(number: int, turn: Turn, began: float) -> Span:
    sampled = began + turn.seconds[0]
    parts = [Span("generate", began, sampled, {"vz.tokens": len(turn.action.token_ids)})]
    if isinstance(turn.zoom, Zoom):
        zoom = turn.zoom
        frames = len(turn.reply.refs) if turn.reply else 0
        asked: Attributes = {
            "vz.start_s": zoom.start_s,
            "vz.end_s": zoom.end_s,
            "vz.fps": zoom.fps,
            "vz.frames": frames,
        }
        parts.append(Span("clip", sampled, sampled + turn.seconds[1], asked))
    refused = turn.zoom.fault.value if turn.zoom and not isinstance(turn.zoom, Zoom) else ""
    said: Attributes = {"vz.refused": refused} if refused else {}
    return Span(f"turn {number}", began, began + sum(turn.seconds), said, tuple(parts))
