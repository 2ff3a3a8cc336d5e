"""Checks of a benchmark's subtitle files before an evaluation starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vz_ray.env.task import Task
from vz_ray.utils.errors import UserError
from vz_ray.video.errors import VideoError
from vz_ray.video.subtitles import read_subtitles


def check_subtitles(tasks: Sequence[Task]) -> tuple[str, ...]:
    """Read each subtitle file once, and return a note if videos have no subtitles.

    Raises:
        UserError: A file is missing or malformed.
    """
    files = {task.subtitles.path: task.subtitles for task in tasks if task.subtitles is not None}
    missing = [path for path in sorted(files) if not Path(path).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(files)} subtitle files do not exist, first {missing[0]}; "
            "set `subtitles` to their folder, or leave it empty to disable subtitles"
        )
    for path, file in files.items():
        try:
            read_subtitles(path, file.offset_s)
        except VideoError as error:
            raise UserError(str(error)) from error
    without = len({task.video for task in tasks if task.subtitles is None})
    return (f"{without} videos have no subtitles",) if without else ()


def drop_missing_subtitles(task: Task) -> Task:
    """Return the task without its subtitles if the file does not exist."""
    if task.subtitles is None or Path(task.subtitles.path).is_file():
        return task
    return replace(task, subtitles=None)
