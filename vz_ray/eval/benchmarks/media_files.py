"""Media files of a benchmark: lookup of videos, checks of subtitles, question images as videos of one frame."""

from __future__ import annotations

import io
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import av
import blake3
from av.video.reformatter import ColorRange

from vz_ray.env.task import Task
from vz_ray.utils.errors import UserError
from vz_ray.video.disk_cache import resolve_cache_dir
from vz_ray.video.errors import VideoError
from vz_ray.video.subtitles import read_subtitles

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


# -- subtitles --------------------------------------------------------------------


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


def drop_missing_subtitles(tasks: Sequence[Task], folder: Path) -> list[Task]:
    """Return the tasks without their subtitles if the file does not exist.

    Raises:
        UserError: `folder` has no subtitles of any task.
    """
    paths = [task.subtitles.path for task in tasks if task.subtitles is not None]
    existing = {path for path in paths if Path(path).is_file()}
    if not existing:
        name = Path(paths[0]).name
        raise UserError(f"subtitles is {folder}; it must have files such as {name} for these videos")
    return [
        task if task.subtitles is not None and task.subtitles.path in existing else replace(task, subtitles=None)
        for task in tasks
    ]


# -- question images --------------------------------------------------------------
# As videos of one frame they take the same path to the model as other frames: through
# the decode pool, with a frame reference that reproduces the same bytes.


def image_cache_dir(configured: str) -> Path:
    """Return the configured folder; by default a folder in the user's cache directory."""
    return Path(configured) if configured else resolve_cache_dir("") / "question_images"


def image_to_video(image: bytes, folder: Path, location: str) -> str:
    """Store an encoded image (PNG, JPEG, ...) as a one-frame video and return its path.

    The file name is the content hash, so each image is encoded once. The video is lossless x264 without
    chroma subsampling.

    Raises:
        UserError: The image cannot be decoded; the message starts with `location`.
    """
    path = folder / f"{blake3.blake3(image).hexdigest()[:32]}.mp4"
    if path.is_file():
        return str(path)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
    try:
        with av.open(io.BytesIO(image), "r") as container:
            frame = next(container.decode(video=0))
        _write(frame, partial)
        partial.replace(path)
    except (av.FFmpegError, StopIteration, IndexError) as error:
        raise UserError(f"{location}: the image cannot be decoded ({error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return str(path)


def _write(frame: av.VideoFrame, path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"qp": "0", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv444p"
        # Without an explicit range, full-range images would be decoded as limited range.
        stream.codec_context.color_range = ColorRange.MPEG
        yuv_frame = frame.reformat(format="yuv444p", dst_color_range=ColorRange.MPEG)
        yuv_frame.pts = 0
        container.mux(stream.encode(yuv_frame))
        container.mux(stream.encode(None))
