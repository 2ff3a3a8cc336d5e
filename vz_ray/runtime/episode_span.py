"""An episode as a trace, from the times that its trajectory carries: nothing is measured for it."""

from __future__ import annotations

from vz_ray.env.trajectory import EpisodeStatus, Trajectory, Turn
from vz_ray.monitoring.tracing import SpanAttributes, TraceSpan
from vz_ray.rollout.rollout_worker import REWARD_SECONDS_KEY
from vz_ray.video.frame import ZoomRequest


def episode_span(trajectory: Trajectory, accepted_s: float, run: str) -> TraceSpan:
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
    scoring = trajectory.extra.get(REWARD_SECONDS_KEY, 0.0)
    reward_s = scoring if isinstance(scoring, float) else 0.0
    over = accepted_s - reward_s
    began = over - trajectory.seconds
    at = over - sum(sum(turn.seconds) for turn in trajectory.turns)
    parts = [TraceSpan("overview", began, max(began, at))]
    for number, turn in enumerate(trajectory.turns):
        parts.append(_turn_span(number, turn, at))
        at += sum(turn.seconds)
    if trajectory.reward is not None:
        parts.append(TraceSpan("reward", over, accepted_s, _reward(trajectory)))
    failed = trajectory.error if trajectory.status is EpisodeStatus.FAILED else ""
    return TraceSpan("episode", began, accepted_s, _episode(trajectory, run), tuple(parts), failed)


def _episode(trajectory: Trajectory, run: str) -> SpanAttributes:
    id = trajectory.id
    return {
        "vz.run": run,
        "vz.episode": str(id),
        "vz.step": id.step,
        "vz.task": id.task_id,
        "vz.sample": id.sample,
        "vz.attempt": id.attempt,
        "vz.worker": trajectory.worker,
        "vz.status": trajectory.status.value,
        "vz.tokens": trajectory.num_tokens,
        "vz.frames": len(trajectory.frame_refs),
        "vz.weight_version": max(trajectory.weight_versions, default=0),
    }


def _reward(trajectory: Trajectory) -> SpanAttributes:
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


def _turn_span(number: int, turn: Turn, began: float) -> TraceSpan:
    sampled = began + turn.seconds[0]
    parts = [TraceSpan("generate", began, sampled, {"vz.tokens": len(turn.action.token_ids)})]
    if isinstance(turn.zoom, ZoomRequest):
        zoom = turn.zoom
        frames = len(turn.observation.frame_refs) if turn.observation else 0
        asked: SpanAttributes = {
            "vz.start_s": zoom.start_s,
            "vz.end_s": zoom.end_s,
            "vz.fps": zoom.fps,
            "vz.frames": frames,
        }
        parts.append(TraceSpan("clip", sampled, sampled + turn.seconds[1], asked))
    refused = turn.zoom.kind.value if turn.zoom and not isinstance(turn.zoom, ZoomRequest) else ""
    said: SpanAttributes = {"vz.refused": refused} if refused else {}
    return TraceSpan(f"turn {number}", began, began + sum(turn.seconds), said, tuple(parts))
