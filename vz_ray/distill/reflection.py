"""The policy's own wrong episodes that zoomed, up to where an expert takes over.

Its zooms stay, its final answer goes. They are what the expert reacts to, and
are read but not learned from: their tokens were sampled by the policy that is
to be taught, and led to a wrong answer, so imitating them would teach the very
mistake that the expert corrects. In the SFT layout they have weight 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vz_ray.data.episode_record import EpisodeRecord, record_from_dict
from vz_ray.distill.teacher_runner import TeacherJob
from vz_ray.env.trajectory import EpisodeStatus, TokenContext, Turn
from vz_ray.utils.errors import UserError
from vz_ray.utils.json_lines import read_complete_lines
from vz_ray.video.frame import ZoomRequest

MIN_TEACHER_TURNS = 2
"""Turns that the expert must have left: a zoom and an answer."""


def find_episode_logs(paths: Sequence[str]) -> list[Path]:
    """The logs that are named, and those in directories that are, in order.

    Raises:
        UserError: There is none; names what was looked for.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        found += sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    missing = [path for path in found if not path.is_file()]
    if missing or not found:
        raise UserError(
            f"no episode log at {missing[0] if missing else paths[0]}: name files or directories of *.jsonl"
        )
    return found


def load_reflection_jobs(
    files: Iterable[Path], wire: str, *, max_rounds: int, max_per_task: int
) -> tuple[list[TeacherJob], Counter[str]]:
    """Jobs for an expert, and how many episodes came in and why the rest are of no use.

    Args:
        files: Episode logs.
        wire: Name of the wire format; tokens of another one cannot be gone on with.
        max_rounds: Most turns in an episode.
        max_per_task: Most episodes of one task.

    Raises:
        UserError: A file is no episode log.
    """
    jobs: list[TeacherJob] = []
    counts: Counter[str] = Counter()
    of_task: Counter[str] = Counter()
    for file in files:
        try:
            for record in _records(file):
                counts["episodes"] += 1
                reason = exclusion_reason(record, wire, max_rounds)
                if not reason and of_task[record.task.task_id] >= max_per_task:
                    reason = "enough of the task"
                if reason:
                    counts[reason] += 1
                    continue
                jobs.append(make_reflection_job(record, max_rounds, of_task[record.task.task_id]))
                of_task[record.task.task_id] += 1
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is no episode log: {error!r}") from error
    return jobs, counts


def _records(file: Path) -> Iterator[EpisodeRecord]:
    """Those of an episode log, or of an evaluation's, which begins with a header."""
    for number, line in enumerate(read_complete_lines(file)):
        header = number == 0 and len(line) == 1 and isinstance(next(iter(line.values())), dict)
        if not header:
            yield record_from_dict(line)


def exclusion_reason(record: EpisodeRecord, wire: str, rounds: int) -> str:
    """Why nothing can be learned from correcting an episode; empty if something can."""
    trajectory = record.trajectory
    if trajectory.status not in (EpisodeStatus.ANSWERED, EpisodeStatus.NO_ANSWER):
        return f"ended as {trajectory.status}"
    if trajectory.reward is None or not trajectory.reward.valid:
        return "not judged"
    if trajectory.reward.accuracy == 1:
        return "right already"
    if trajectory.chat_format != wire:
        return "of another wire format"
    if not select_prefix_turns(record, rounds):
        return "did not zoom"
    return ""


def select_prefix_turns(record: EpisodeRecord, rounds: int) -> tuple[Turn, ...]:
    """The turns that stay: up to a zoom that was carried out, with room for the expert's own after it."""
    given = [turn for turn in record.trajectory.turns if turn.observation is not None][
        : rounds - MIN_TEACHER_TURNS
    ]
    while given and not isinstance(given[-1].zoom, ZoomRequest):
        given.pop()
    return tuple(given)


def make_reflection_job(record: EpisodeRecord, rounds: int, sample: int) -> TeacherJob:
    """What the expert goes on from."""
    given = select_prefix_turns(record, rounds)
    contexts: list[TokenContext] = [record.trajectory.prompt]
    contexts += [turn.observation for turn in given if turn.observation is not None]
    shown = tuple(ref.digest for context in contexts for ref in context.frame_refs)
    return TeacherJob(record.task, sample, given, shown)
