"""Rewards of single turns: which zooms were valid, looked at something new, and found the evidence."""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.config.reward import TurnRewardConfig
from vz_ray.env.failure_modes import Interval, is_visible
from vz_ray.env.task import Task
from vz_ray.env.trajectory import Trajectory
from vz_ray.video.frame import ZoomRequest


def score_turns(trajectory: Trajectory, task: Task, config: TurnRewardConfig) -> tuple[float, ...]:
    """Return the reward of each turn; empty if every weight is 0.

    A turn with a served zoom gets `valid_zoom + new_time * n + evidence * e`, other turns 0. n is the share of its
    segment that no earlier zoom into the same video covered. e is the share of the task's evidence spans of which no
    earlier zoom showed a frame and this one does, so that a span is rewarded once.
    """
    if not config.enabled:
        return ()
    rewards: list[float] = []
    segments: dict[int, list[Interval]] = {}
    unseen = list(task.evidence_spans)
    for turn in trajectory.turns:
        if not isinstance(turn.zoom, ZoomRequest) or turn.observation is None:
            rewards.append(0.0)
            continue
        earlier, segment = segments.setdefault(turn.zoom.video, []), (turn.zoom.start_s, turn.zoom.end_s)
        times = [ref.pts_s for ref in turn.observation.frame_refs]
        shown = [span for span in unseen if is_visible(times, span)]
        unseen = [span for span in unseen if span not in shown]
        share = len(shown) / max(1, len(task.evidence_spans))
        rewards.append(
            config.valid_zoom + config.new_time * _uncovered_share(segment, earlier) + config.evidence * share
        )
        earlier.append(segment)
    return tuple(rewards)


def _uncovered_share(segment: Interval, earlier: Sequence[Interval]) -> float:
    """Return the share of a segment outside the union of earlier ones; 0 for an empty segment."""
    start, end = segment
    uncovered, position = 0.0, start
    for other_start, other_end in sorted(earlier):
        uncovered += max(0.0, min(other_start, end) - position)
        position = min(max(position, other_end), end)
    return (uncovered + end - position) / (end - start) if end > start else 0.0
