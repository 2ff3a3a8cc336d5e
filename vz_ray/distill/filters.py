"""Which episodes are worth learning from, and why each of the others is not. Pure.

Every rule takes episodes and returns those it keeps, with a `DroppedEpisode` for each
of the rest: what comes in is what goes out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from vz_ray.config.distill import FilterConfig
from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.data.sft_file import IMAGE_MARKER
from vz_ray.distill.teacher_runner import PREFIX_TURNS
from vz_ray.distill.zoom_patterns import ZoomPattern, classify_pattern
from vz_ray.env.trajectory import EpisodeStatus, RejectedZoom, ZoomErrorKind
from vz_ray.rewards import is_well_formed
from vz_ray.video.frame import ZoomRequest


@dataclass(frozen=True, slots=True)
class DroppedEpisode:
    """An episode that is not kept.

    Attributes:
        episode_id: Its id.
        reason: One of a few, to be counted by.
    """

    episode_id: str
    reason: str


FilterResult = tuple[list[EpisodeRecord], list[DroppedEpisode]]
"""What a rule keeps, and what it does not."""


def count_prefix_turns(record: EpisodeRecord) -> int:
    """How many of its first turns were the policy's, not the expert's."""
    given = record.trajectory.extra.get(PREFIX_TURNS, 0)
    return given if isinstance(given, int) else 0


def find_fault(record: EpisodeRecord, config: FilterConfig, max_zoom_frames: int) -> str:
    """Why an episode is not one to imitate; empty if it is. Only the expert's own turns are looked at."""
    trajectory = record.trajectory
    own = trajectory.turns[count_prefix_turns(record) :]
    reward = trajectory.reward
    if trajectory.status is EpisodeStatus.FAILED:
        return f"failed: {trajectory.error.partition(':')[0]}"
    if reward is None or not reward.valid:
        return "not judged"
    if trajectory.status is EpisodeStatus.TRUNCATED:
        return "out of room"
    if trajectory.status is EpisodeStatus.NO_ANSWER:
        return _unanswered(own[-1].zoom if own else None)
    if reward.accuracy != 1:
        return "wrong answer"
    if any(IMAGE_MARKER in turn.text for turn in trajectory.turns):
        return f"a text with {IMAGE_MARKER}"
    if config.require_format and not is_well_formed([turn.text for turn in own], max_zoom_frames):
        return "bad format"
    if config.require_zoom and not any(isinstance(turn.zoom, ZoomRequest) for turn in own):
        return "did not zoom"
    return ""


def _unanswered(last: ZoomRequest | RejectedZoom | None) -> str:
    never = isinstance(last, RejectedZoom) and last.kind is ZoomErrorKind.LAST_ROUND
    return "never stopped zooming" if never else "broken call in the last turn" if last else "no answer"


def filter_faults(
    records: Sequence[EpisodeRecord], config: FilterConfig, max_zoom_frames: int
) -> FilterResult:
    """Those that are right and as asked for."""
    kept, dropped = [], []
    for record in records:
        if reason := find_fault(record, config, max_zoom_frames):
            dropped.append(DroppedEpisode(str(record.trajectory.id), reason))
        else:
            kept.append(record)
    return kept, dropped


def compute_pass_rates(records: Sequence[EpisodeRecord]) -> dict[str, float]:
    """By task, the share of right answers among the attempts that could be judged."""
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for record in records:
        reward = record.trajectory.reward
        if record.trajectory.status is not EpisodeStatus.FAILED and reward is not None and reward.valid:
            right[record.task.task_id].append(reward.accuracy == 1)
    return {task: sum(found) / len(found) for task, found in right.items()}


def filter_by_pass_rate(
    records: Sequence[EpisodeRecord], rates: dict[str, float], config: FilterConfig
) -> FilterResult:
    """Those of tasks that are neither too hard nor too easy."""
    kept, dropped = [], []
    for record in records:
        rate = rates[record.task.task_id]
        if rate < config.min_pass_rate:
            dropped.append(DroppedEpisode(str(record.trajectory.id), "task too hard"))
        elif rate > config.max_pass_rate:
            dropped.append(DroppedEpisode(str(record.trajectory.id), "task too easy"))
        else:
            kept.append(record)
    return kept, dropped


def limit_per_task(records: Sequence[EpisodeRecord], max_per_task: int) -> FilterResult:
    """At most so many of a task, of as many patterns as it has; otherwise the first ones."""
    by_task: defaultdict[str, list[EpisodeRecord]] = defaultdict(list)
    for record in records:
        by_task[record.task.task_id].append(record)
    kept, dropped = [], []
    for own in by_task.values():
        order = _patterns_in_turn(own)
        kept += order[:max_per_task]
        dropped += [
            DroppedEpisode(str(one.trajectory.id), "enough of the task") for one in order[max_per_task:]
        ]
    return kept, dropped


def _patterns_in_turn(records: Sequence[EpisodeRecord]) -> list[EpisodeRecord]:
    """The first of each pattern, then the second of each, and so on."""
    seen: defaultdict[ZoomPattern, int] = defaultdict(int)
    ranked = []
    for place, record in enumerate(records):
        pattern = classify_pattern(record.trajectory)
        ranked.append((seen[pattern], place, record))
        seen[pattern] += 1
    return [record for _, _, record in sorted(ranked, key=lambda item: item[:2])]
