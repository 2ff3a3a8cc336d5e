"""Videos and frames of episodes for the front end."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from pathlib import Path
from typing import Any

from vz_ray.env.trajectory import TokenContext
from vz_ray.report.thumbnails import evenly_spaced, make_thumbnails
from vz_ray.report.viewer.episode_view import MAX_FRAMES
from vz_ray.utils.timeouts import StepTimeout
from vz_ray.video.errors import SourceNotAllowedError, VideoError
from vz_ray.video.image_reader import is_image
from vz_ray.video.local_source import LocalFrameSource
from vz_ray.video.video_file import FileKey, VideoLimits, file_key, is_url, open_video

Json = dict[str, Any]

THUMBNAIL_PX = 224
"""Maximum side of a thumbnail."""
TIMEOUT_S = 60.0
MAX_CACHED_STRIPS = 64
"""Maximum number of cached thumbnail strips."""

MEDIA_TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/mp4",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".avi": "video/x-msvideo",
}


class FrameServer:
    """Serves videos and thumbnails. Each decoded frame is verified against the hash of its reference.

    Args:
        decoder: Decoder of the run.
    """

    def __init__(self, decoder: str = "pyav") -> None:
        self._frames = LocalFrameSource(decoder=decoder)
        self._videos: set[FileKey] = set()
        self._strips: OrderedDict[tuple[Any, ...], list[str]] = OrderedDict()

    def close(self) -> None:
        self._frames.close()

    def video_file(self, uri: str) -> tuple[Path, str]:
        """Return a local video file and its media type.

        The file is opened first, because a log may name any file. Only videos in a known container are served.

        Raises:
            VideoError: The file is missing, or is not a video.
        """
        if is_url(uri):
            raise SourceNotAllowedError(f"{uri}: URLs are not fetched", "the video is not on this machine")
        key = file_key(uri)
        if key not in self._videos:
            if is_image(uri):
                raise SourceNotAllowedError(f"{uri}: images have no timeline", "the file is an image")
            container, _ = open_video(uri, VideoLimits())
            container.close()
            self._videos.add(key)
        path = Path(key[0])
        return path, MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")

    async def video_info(self, uri: str) -> Json:
        """Return length and size of a video; `error` if it cannot be read."""
        try:
            await asyncio.to_thread(self.video_file, uri)
            info = await self._frames.probe(uri)
        except (VideoError, StepTimeout) as error:
            return {"error": str(error)}
        return {"error": "", "duration": info.duration_s, "width": info.width, "height": info.height}

    async def thumbnail_strip(self, context: TokenContext) -> Json:
        """Return the frames of an overview or zoom as `data:` URIs; `error` if they are not available."""
        refs = evenly_spaced(context.frame_refs, MAX_FRAMES)
        key = tuple((ref.uri, ref.pts_s, ref.digest) for ref in refs)
        if key not in self._strips:
            decoded, error = await make_thumbnails(refs, self._frames, max_side_px=THUMBNAIL_PX, timeout_s=TIMEOUT_S)
            if error:
                return {"error": error, "frames": []}
            self._strips[key] = [decoded[ref] for ref in refs]
            while len(self._strips) > MAX_CACHED_STRIPS:
                self._strips.popitem(last=False)
        self._strips.move_to_end(key)
        return {"error": "", "frames": self._strips[key]}
