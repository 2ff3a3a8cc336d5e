"""The pixels of an episode: its video as a file to play, and the frames that the model saw."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from vz_ray.env.trajectory import TokenContext
from vz_ray.report.thumbnails import make_thumbnails
from vz_ray.report.viewer.episode_view import shown_ref_indices
from vz_ray.utils.timeouts import StepTimeout
from vz_ray.video.errors import SourceNotAllowedError, VideoError
from vz_ray.video.image_reader import is_image
from vz_ray.video.local_source import LocalFrameSource
from vz_ray.video.video_file import FileKey, VideoLimits, file_key, is_url, open_video

Json = dict[str, Any]

THUMBNAIL_PX = 224
"""Longest side of a thumbnail."""
TIMEOUT_S = 60.0
MAX_CACHED_STRIPS = 64
"""Overviews and zooms whose thumbnails are kept."""

MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/mp4",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".avi": "video/x-msvideo",
}


class FrameServer:
    """Videos and frames for a browser; the hash of every frame is checked against its reference.

    Args:
        decoder: What the run's frames were decoded with.
    """

    def __init__(self, decoder: str = "pyav") -> None:
        self._frames = LocalFrameSource(decoder=decoder)
        self._videos: set[FileKey] = set()
        self._strips: OrderedDict[tuple[Any, ...], list[str]] = OrderedDict()

    def close(self) -> None:
        self._frames.close()

    def video_file(self, uri: str) -> tuple[Path, str]:
        """A video that may be sent to the browser, and its media type.

        It is opened first: a log may name any file, and only what is a video in
        a known container is sent.

        Raises:
            VideoError: There is none, or it is something else.
        """
        if is_url(uri):
            raise SourceNotAllowedError(
                f"{uri}: a URL, which is not fetched here", "the video is not on this machine"
            )
        key = file_key(uri)
        if key not in self._videos:
            if not is_image(uri):
                container, _ = open_video(uri, VideoLimits())
                container.close()
            else:
                raise SourceNotAllowedError(f"{uri}: an image, which has no timeline", "the file is an image")
            self._videos.add(key)
        path = Path(key[0])
        return path, MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")

    async def video_info(self, uri: str) -> Json:
        """Length and size of a video; `trouble` in words where it cannot be read."""
        try:
            self.video_file(uri)
            info = await self._frames.probe(uri)
        except (VideoError, StepTimeout) as error:
            return {"trouble": str(error)}
        return {"trouble": "", "duration": info.duration_s, "width": info.width, "height": info.height}

    async def thumbnail_strip(self, context: TokenContext) -> Json:
        """The frames of an overview or a zoom as `data:` URIs, in order; `trouble` where there are none."""
        refs = [context.frame_refs[k] for k in shown_ref_indices(context)]
        key = tuple((ref.uri, ref.pts_s, ref.digest) for ref in refs)
        if key not in self._strips:
            found, trouble = await make_thumbnails(
                refs, self._frames, max_side_px=THUMBNAIL_PX, timeout_s=TIMEOUT_S
            )
            if trouble:
                return {"trouble": trouble, "frames": []}
            self._strips[key] = [found[ref] for ref in refs]
            while len(self._strips) > MAX_CACHED_STRIPS:
                self._strips.popitem(last=False)
        self._strips.move_to_end(key)
        return {"trouble": "", "frames": self._strips[key]}
