"""The pixels of an episode: its video as a file to play, and the frames that the model saw."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from vz_ray.episode.trajectory import Context
from vz_ray.observe.deadline import Overdue
from vz_ray.report.browser.episode_view import shown_refs
from vz_ray.report.pictures import thumbnails
from vz_ray.video.errors import SourceRefused
from vz_ray.video.frame import VideoError
from vz_ray.video.image_files import is_image
from vz_ray.video.local import LocalFrames
from vz_ray.video.source import FileKey, Limits, file_key, is_remote, open_video

Json = dict[str, Any]

LONGEST_PX = 224
"""Longest side of a thumbnail."""
DEADLINE_S = 60.0
MOST_STRIPS = 64
"""Overviews and zooms whose thumbnails are kept."""

TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/mp4",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".avi": "video/x-msvideo",
}


class Pixels:
    """Videos and frames for a browser; the hash of every frame is checked against its reference.

    Args:
        decoder: What the run's frames were decoded with.
    """

    def __init__(self, decoder: str = "pyav") -> None:
        self._frames = LocalFrames(decoder=decoder)
        self._videos: set[FileKey] = set()
        self._strips: OrderedDict[tuple[Any, ...], list[str]] = OrderedDict()

    def close(self) -> None:
        self._frames.close()

    def file(self, uri: str) -> tuple[Path, str]:
        """A video that may be sent to the browser, and its media type.

        It is opened first: a log may name any file, and only what is a video in
        a known container is sent.

        Raises:
            VideoError: There is none, or it is something else.
        """
        if is_remote(uri):
            raise SourceRefused(
                f"{uri}: a URL, which is not fetched here", "the video is not on this machine"
            )
        key = file_key(uri)
        if key not in self._videos:
            if not is_image(uri):
                container, _ = open_video(uri, Limits())
                container.close()
            else:
                raise SourceRefused(f"{uri}: an image, which has no timeline", "the file is an image")
            self._videos.add(key)
        path = Path(key[0])
        return path, TYPES.get(path.suffix.lower(), "application/octet-stream")

    async def facts(self, uri: str) -> Json:
        """Length and size of a video; `trouble` in words where it cannot be read."""
        try:
            self.file(uri)
            info = await self._frames.probe(uri)
        except (VideoError, Overdue) as error:
            return {"trouble": str(error)}
        return {"trouble": "", "duration": info.duration_s, "width": info.width, "height": info.height}

    async def strip(self, context: Context) -> Json:
        """The frames of an overview or a zoom as `data:` URIs, in order; `trouble` where there are none."""
        refs = [context.refs[k] for k in shown_refs(context)]
        key = tuple((ref.uri, ref.pts_s, ref.digest) for ref in refs)
        if key not in self._strips:
            found, trouble = await thumbnails(refs, self._frames, longest=LONGEST_PX, deadline_s=DEADLINE_S)
            if trouble:
                return {"trouble": trouble, "frames": []}
            self._strips[key] = [found[ref] for ref in refs]
            while len(self._strips) > MOST_STRIPS:
                self._strips.popitem(last=False)
        self._strips.move_to_end(key)
        return {"trouble": "", "frames": self._strips[key]}
