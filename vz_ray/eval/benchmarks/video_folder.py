"""Lookup of a benchmark's videos, and of missing videos."""

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
    """Finds videos below `root` by the names in the annotations, in any subfolder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, name: str) -> str:
        """Return the path of a video.

        Args:
            name: Path below `root`, file name, or file name without extension. A missing video gets the path
                directly below `root`.

        Raises:
            UserError: Several files match, and no match is at the path `name`.
        """
        direct = self.root / name
        if direct.is_file():
            return str(direct)
        matches = self._files.get(Path(name).name) or [
            path
            for extension in (*VIDEO_EXTENSIONS, *map(str.upper, VIDEO_EXTENSIONS))
            for path in self._files.get(Path(name).name + extension, ())
        ]
        matches = [path for path in matches if str(path).endswith(os.sep + name)] or matches
        if len(matches) > 1:
            raise UserError(
                f"{self.root} has {len(matches)} videos called {name}: {matches[0]}, {matches[1]}; keep one"
            )
        missing = direct if direct.suffix.lower() in VIDEO_EXTENSIONS else self.root / f"{name}.mp4"
        return str(matches[0] if matches else missing)

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """All files below the root by name; the tree is walked once."""
        files: defaultdict[str, list[Path]] = defaultdict(list)
        for folder, _, names in os.walk(self.root, followlinks=True):
            for name in names:
                files[name].append(Path(folder) / name)
        return dict(files)


@dataclass(frozen=True, slots=True)
class MissingVideos:
    """Missing videos of a set of tasks.

    Attributes:
        paths: Paths of the missing videos, sorted.
        num_videos: Number of videos of the tasks.
        num_questions: Number of questions about missing videos.
    """

    paths: tuple[str, ...]
    num_videos: int
    num_questions: int

    def __str__(self) -> str:
        paths = ", ".join(self.paths[:3]) + (", ..." if len(self.paths) > 3 else "")
        counts = f"{len(self.paths)} of {self.num_videos} videos"
        return f"{counts} do not exist ({self.num_questions} questions): {paths}"


def find_missing_videos(tasks: Iterable[Task]) -> MissingVideos:
    """Return the local videos of `tasks` that do not exist; URLs are not checked."""
    questions: defaultdict[str, int] = defaultdict(int)
    for task in tasks:
        questions[task.video] += 1
    missing = sorted(video for video in questions if "://" not in video and not Path(video).is_file())
    return MissingVideos(tuple(missing), len(questions), sum(questions[video] for video in missing))
