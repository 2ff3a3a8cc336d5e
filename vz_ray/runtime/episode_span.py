"""Trace of an episode, built from the durations stored in its trajectory."""

from __future__ import annotations

from vz_ray.env.trajectory import EpisodeStatus, Trajectory, Turn
from vz_ray.monitoring.tracing import SpanAttributes, TraceSpan
from vz_ray.rollout.rollout_worker import REWARD_SECONDS_KEY
from vz_ray.video.frame import ZoomRequest


def episode_span(trajectory: Trajectory, accepted_s: float, run: str) -> TraceSpan:
    """Return the trace of an episode.

        episode
          overview       until the first turn: probe, overview, queue
          turn 0         generate, clip
          turn 1         generate
          reward

    Args:
        trajectory: Scored trajectory.
        accepted_s: End of the trace: time of acceptance, seconds since the epoch.
        run: Name of the run.
    """
    scoring = trajectory.extra.get(REWARD_SECONDS_KEY, 0.0)
    reward_s = scoring if isinstance(scoring, float) else 0.0
    end_s = accepted_s - reward_s
    start_s = end_s - trajectory.seconds
    turn_start_s = end_s - sum(sum(turn.seconds) for turn in trajectory.turns)
    children = [TraceSpan("overview", start_s, max(start_s, turn_start_s))]
    for number, turn in enumerate(trajectory.turns):
        children.append(_turn_span(number, turn, turn_start_s))
        turn_start_s += sum(turn.seconds)
    if trajectory.reward is not None:
        children.append(TraceSpan("reward", end_s, accepted_s, _reward_attributes(trajectory)))
    error = trajectory.error if trajectory.status is EpisodeStatus.FAILED else ""
    attributes = _episode_attributes(trajectory, run)
    return TraceSpan("episode", start_s, accepted_s, attributes, tuple(children), error)


def _episode_attributes(trajectory: Trajectory, run: str) -> SpanAttributes:
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


def _reward_attributes(trajectory: Trajectory) -> SpanAttributes:
    reward = trajectory.reward
    if reward is None:
        return {}
    return {
        "vz.reward.total": reward.total,
        "vz.reward.accuracy": reward.accuracy,
        "vz.reward.format": reward.format,
        "vz.reward.tool": reward.tool,
        "vz.reward.valid": reward.valid,
    }


def _turn_span(number: int, turn: Turn, start_s: float) -> TraceSpan:
    generated_s = start_s + turn.seconds[0]
    children = [TraceSpan("generate", start_s, generated_s, {"vz.tokens": len(turn.action.token_ids)})]
    attributes: SpanAttributes = {}
    if isinstance(turn.zoom, ZoomRequest):
        clip_attributes: SpanAttributes = {
            "vz.start_s": turn.zoom.start_s,
            "vz.end_s": turn.zoom.end_s,
            "vz.fps": turn.zoom.fps,
            "vz.frames": len(turn.observation.frame_refs) if turn.observation else 0,
        }
        children.append(TraceSpan("clip", generated_s, generated_s + turn.seconds[1], clip_attributes))
    elif turn.zoom is not None:
        attributes = {"vz.zoom_error": turn.zoom.kind.value}
    return TraceSpan(f"turn {number}", start_s, start_s + sum(turn.seconds), attributes, tuple(children))
