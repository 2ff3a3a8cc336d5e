"""Which episodes are worth learning from, and why each of the others is not. Pure.

Every rule takes episodes and returns those it keeps, with a `Dropped` for each
of the rest: what comes in is what goes out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from vz_ray.coldstart.distill.patterns import Pattern, pattern_of
from vz_ray.coldstart.distill.studio import GIVEN
from vz_ray.config.distill import CurateConfig
from vz_ray.data.record import EpisodeRecord
from vz_ray.data.sft_file import MARK
from vz_ray.episode.trajectory import Status, ZoomFault, ZoomRefused
from vz_ray.reward import format_ok
from vz_ray.video.frame import Zoom


@dataclass(frozen=True, slots=True)
class Dropped:
    """An episode that is not kept.

    Attributes:
        name: Its id.
        reason: One of a few, to be counted by.
    """

    name: str
    reason: str


Sieved = tuple[list[EpisodeRecord], list[Dropped]]
"""What a rule keeps, and what it does not."""


def given_turns(record: EpisodeRecord) -> int:
    """How many of its first turns were the policy's, not the expert's."""
    given = record.trajectory.extra.get(GIVEN, 0)
    return given if isinstance(given, int) else 0


def fault_of(record: EpisodeRecord, config: CurateConfig, max_zoom_frames: int) -> str:
    """Why an episode is not one to imitate; empty if it is. Only the expert's own turns are looked at."""
    trajectory = record.trajectory
    own = trajectory.turns[given_turns(record) :]
    reward = trajectory.reward
    if trajectory.status is Status.FAILED:
        return f"failed: {trajectory.error.partition(':')[0]}"
    if reward is None or not reward.valid:
        return "not judged"
    if trajectory.status is Status.TRUNCATED:
        return "out of room"
    if trajectory.status is Status.NO_ANSWER:
        return _unanswered(own[-1].zoom if own else None)
    if reward.accuracy != 1:
        return "wrong answer"
    if any(MARK in turn.text for turn in trajectory.turns):
        return f"a text with {MARK}"
    if config.formatted and not format_ok([turn.text for turn in own], max_zoom_frames):
        return "bad format"
    if config.zoomed and not any(isinstance(turn.zoom, Zoom) for turn in own):
        return "did not zoom"
    return ""


def _unanswered(last: Zoom | ZoomRefused | None) -> str:
    never = isinstance(last, ZoomRefused) and last.fault is ZoomFault.LAST_ROUND
    return "never stopped zooming" if never else "broken call in the last turn" if last else "no answer"


def without_faults(records: Sequence[EpisodeRecord], config: CurateConfig, max_zoom_frames: int) -> Sieved:
    """Those that are right and as asked for."""
    kept, dropped = [], []
    for record in records:
        if reason := fault_of(record, config, max_zoom_frames):
            dropped.append(Dropped(str(record.trajectory.id), reason))
        else:
            kept.append(record)
    return kept, dropped


def pass_rates(records: Sequence[EpisodeRecord]) -> dict[str, float]:
    """By task, the share of right answers among the attempts that could be judged."""
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for record in records:
        reward = record.trajectory.reward
        if record.trajectory.status is not Status.FAILED and reward is not None and reward.valid:
            right[record.task.task_id].append(reward.accuracy == 1)
    return {task: sum(found) / len(found) for task, found in right.items()}


def by_pass_rate(records: Sequence[EpisodeRecord], rates: dict[str, float], config: CurateConfig) -> Sieved:
    """Those of tasks that are neither too hard nor too easy."""
    kept, dropped = [], []
    for record in records:
        rate = rates[record.task.task_id]
        if rate < config.min_pass:
            dropped.append(Dropped(str(record.trajectory.id), "task too hard"))
        elif rate > config.max_pass:
            dropped.append(Dropped(str(record.trajectory.id), "task too easy"))
        else:
            kept.append(record)
    return kept, dropped


def most_per_task(records: Sequence[EpisodeRecord], most: int) -> Sieved:
    """At most so many of a task, of as many patterns as it has; otherwise the first ones."""
    by_task: defaultdict[str, list[EpisodeRecord]] = defaultdict(list)
    for record in records:
        by_task[record.task.task_id].append(record)
    kept, dropped = [], []
    for own in by_task.values():
        order = _patterns_in_turn(own)
        kept += order[:most]
        dropped += [Dropped(str(one.trajectory.id), "enough of the task") for one in order[most:]]
    return kept, dropped


def _patterns_in_turn(records: Sequence[EpisodeRecord]) -> list[EpisodeRecord]:
    """The first of each pattern, then the second of each, and so on."""
    seen: defaultdict[Pattern, int] = defaultdict(int)
    ranked = []
    for place, record in enumerate(records):
        pattern = pattern_of(record.trajectory)
        ranked.append((seen[pattern], place, record))
        seen[pattern] += 1
    return [record for _, _, record in sorted(ranked, key=lambda item: item[:2])]
