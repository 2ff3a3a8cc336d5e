"""A frame source in this process: no Ray, one decoding thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.clip_reader import ClipReader, ReaderStats
from vz_ray.video.frame import (
    Clip,
    Frame,
    FrameRef,
    FrameSize,
    ImageRequest,
    OverviewRequest,
    SelectedFramesRequest,
    VideoInfo,
    ZoomRequest,
)
from vz_ray.video.video_file import VideoLimits

T = TypeVar("T")


class LocalFrameSource:
    """Decodes in a thread of this process; the `FrameSource` of scripts, tests and data making.

    Requests are served one by one, in order, so that samples of one task find
    what the first of them decoded. A decoder that hangs cannot be killed here,
    only reported (`StepTimeout`): where files are not trusted use the clip pool.

    Example:
        >>> with LocalFrames() as frames:
        ...     clip = asyncio.run(frames.zoom("talk.mp4", Zoom(10, 14, fps=2), FrameSize()))
    """

    def __init__(
        self,
        *,
        cache_bytes: int = 256 * 2**20,
        max_open_videos: int = 8,
        limits: VideoLimits | None = None,
        decoder: str = "pyav",
        timeout_s: float = 120.0,
    ) -> None:
        self._reader = ClipReader(
            cache_bytes=cache_bytes, max_open_videos=max_open_videos, limits=limits, decoder=decoder
        )
        self._deadline_s = timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decode")

    def __enter__(self) -> LocalFrameSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def probe(self, uri: str) -> VideoInfo:
        return await self._run(f"probe of {uri}", lambda: self._reader.probe(uri))

    async def overview(
        self, uri: str, request: OverviewRequest | SelectedFramesRequest | ImageRequest, size: FrameSize
    ) -> Clip:
        return await self._run(f"overview of {uri}", lambda: self._reader.overview(uri, request, size))

    async def zoom(self, uri: str, request: ZoomRequest, size: FrameSize) -> Clip:
        what = f"zoom of {uri} [{request.start_s:g}, {request.end_s:g}] at {request.fps:g} fps"
        return await self._run(what, lambda: self._reader.zoom(uri, request, size))

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        return await self._run(f"{len(refs)} frames by reference", lambda: self._reader.resolve(refs))

    async def stats(self) -> ReaderStats:
        return await self._run("statistics", self._reader.stats)

    def close(self) -> None:
        """Closes every video once the request in progress is done."""
        self._thread.submit(self._reader.close)
        self._thread.shutdown(wait=True)

    async def _run(self, what: str, call: Callable[[], T]) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._thread, call)
        return await with_timeout(future, self._deadline_s, target="the decoding thread", operation=what)
