"""Where a benchmark's videos are, and which of them are not there."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vz_ray.env.task import Task
from vz_ray.utils.errors import UserError

VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".flv", ".ts", ".mpg")


class VideoFolder:
    """Finds videos by the names that annotations give, wherever below `root` an archive put them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, name: str) -> str:
        """Path of a video.

        `name` is a path, a file name, or a name without its ending. A video
        that is not there gets the path where it was looked for first.

        Raises:
            UserError: Several files have this name, and none lies where `name` says.
        """
        direct = self.root / name
        if direct.is_file():
            return str(direct)
        found = self._files.get(Path(name).name) or [
            path
            for ending in (*VIDEO_EXTENSIONS, *map(str.upper, VIDEO_EXTENSIONS))
            for path in self._files.get(Path(name).name + ending, ())
        ]
        nearer = [path for path in found if str(path).endswith(os.sep + name)] or found
        if len(nearer) > 1:
            raise UserError(
                f"{self.root} has {len(nearer)} videos called {name}: {nearer[0]}, {nearer[1]}; keep one"
            )
        missing = direct if direct.suffix.lower() in VIDEO_EXTENSIONS else self.root / f"{name}.mp4"
        return str(nearer[0] if nearer else missing)

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """Every file below the root, by name; walked once."""
        files: defaultdict[str, list[Path]] = defaultdict(list)
        for folder, _, names in os.walk(self.root, followlinks=True):
            for name in names:
                files[name].append(Path(folder) / name)
        return dict(files)


@dataclass(frozen=True, slots=True)
class MissingVideos:
    """Videos that are not there.

    Attributes:
        paths: Their paths, sorted.
        num_videos: How many videos the questions are about.
        num_questions: Questions about those that are missing.
    """

    paths: tuple[str, ...]
    num_videos: int
    num_questions: int

    def __str__(self) -> str:
        shown = ", ".join(self.paths[:3]) + (", ..." if len(self.paths) > 3 else "")
        return f"{len(self.paths)} of {self.num_videos} videos do not exist ({self.num_questions} questions): {shown}"


def find_missing_videos(tasks: Iterable[Task]) -> MissingVideos:
    """Local videos of `tasks` that do not exist; URLs are left to whoever fetches them."""
    questions: defaultdict[str, int] = defaultdict(int)
    for task in tasks:
        questions[task.video] += 1
    gone = sorted(video for video in questions if "://" not in video and not Path(video).is_file())
    return MissingVideos(tuple(gone), len(questions), sum(questions[video] for video in gone))
