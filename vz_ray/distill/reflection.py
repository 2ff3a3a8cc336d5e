"""Reflection jobs: the policy's wrong episodes, cut before the teacher takes over.

The policy's zoom turns are kept as a prefix; its final answer is removed. The prefix has no loss (weight 0 in
the SFT file): it led to a wrong answer, and imitating it would teach the mistake that the teacher corrects.
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
"""Turns reserved for the teacher: a zoom and an answer."""


def find_episode_logs(paths: Sequence[str]) -> list[Path]:
    """Return the given log files and the log files in the given directories, in order.

    Raises:
        UserError: A file is missing, or there are no log files.
    """
    logs: list[Path] = []
    for path in map(Path, paths):
        logs += sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    missing = [path for path in logs if not path.is_file()]
    if missing or not logs:
        raise UserError(
            f"no episode log at {missing[0] if missing else paths[0]}; "
            "`episodes` must list *.jsonl files or directories that contain them"
        )
    return logs


def load_reflection_jobs(
    files: Iterable[Path], chat_format: str, *, max_rounds: int, max_per_task: int
) -> tuple[list[TeacherJob], Counter[str]]:
    """Build jobs from wrong episodes; also return the number of episodes and of exclusions by reason.

    Args:
        files: Episode logs.
        chat_format: Name of the chat format. Episodes in another format are excluded.
        max_rounds: Maximum turns of an episode.
        max_per_task: Maximum jobs per task.

    Raises:
        UserError: A file is not an episode log.
    """
    jobs: list[TeacherJob] = []
    counts: Counter[str] = Counter()
    jobs_per_task: Counter[str] = Counter()
    for file in files:
        try:
            for record in _read_records(file):
                counts["episodes"] += 1
                reason = exclusion_reason(record, chat_format, max_rounds)
                if not reason and jobs_per_task[record.task.task_id] >= max_per_task:
                    reason = "task limit"
                if reason:
                    counts[reason] += 1
                    continue
                jobs.append(make_reflection_job(record, max_rounds, jobs_per_task[record.task.task_id]))
                jobs_per_task[record.task.task_id] += 1
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is not an episode log: {error!r}") from error
    return jobs, counts


def _read_records(file: Path) -> Iterator[EpisodeRecord]:
    """Read an episode log. The log of an evaluation starts with a header line, which is skipped."""
    for number, line in enumerate(read_complete_lines(file)):
        is_header = number == 0 and len(line) == 1 and isinstance(next(iter(line.values())), dict)
        if not is_header:
            yield record_from_dict(line)


def exclusion_reason(record: EpisodeRecord, chat_format: str, max_rounds: int) -> str:
    """Return why an episode is not suitable for correction; empty if it is suitable."""
    trajectory = record.trajectory
    if trajectory.status not in (EpisodeStatus.ANSWERED, EpisodeStatus.NO_ANSWER):
        return f"ended as {trajectory.status}"
    if trajectory.reward is None or not trajectory.reward.valid:
        return "not scored"
    if trajectory.reward.accuracy == 1:
        return "already correct"
    if trajectory.chat_format != chat_format:
        return "different chat format"
    if not select_prefix_turns(record, max_rounds):
        return "did not zoom"
    return ""


def select_prefix_turns(record: EpisodeRecord, max_rounds: int) -> tuple[Turn, ...]:
    """Return the turns up to the last executed zoom that leaves `MIN_TEACHER_TURNS` for the teacher."""
    turns = [turn for turn in record.trajectory.turns if turn.observation is not None]
    prefix = turns[: max_rounds - MIN_TEACHER_TURNS]
    while prefix and not isinstance(prefix[-1].zoom, ZoomRequest):
        prefix.pop()
    return tuple(prefix)


def make_reflection_job(record: EpisodeRecord, max_rounds: int, sample: int) -> TeacherJob:
    """Build the job that continues after the prefix turns of `record`."""
    prefix_turns = select_prefix_turns(record, max_rounds)
    contexts: list[TokenContext] = [record.trajectory.prompt]
    contexts += [turn.observation for turn in prefix_turns if turn.observation is not None]
    digests = tuple(ref.digest for context in contexts for ref in context.frame_refs)
    return TeacherJob(record.task, sample, prefix_turns, digests)
