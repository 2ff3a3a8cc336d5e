"""Frame source in the current process: one decoding thread, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.clip_reader import ClipReader, ReaderStats
from vz_ray.video.frame import Clip, ClipRequest, Frame, FrameRef, FrameSize, VideoInfo, describe_clip

T = TypeVar("T")


class LocalFrameSource:
    """`FrameSource` that decodes in a thread, for scripts and tests.

    Requests are served sequentially, in FIFO order, so repeated requests are cache hits. A hung
    decoder raises `StepTimeout` but cannot be killed; use the decode pool for untrusted files.

    Example:
        >>> with LocalFrameSource() as frames:
        ...     clip = asyncio.run(frames.clip("talk.mp4", ZoomRequest(10, 14, fps=2), FrameSize(784, 50_176, 28)))
    """

    def __init__(
        self,
        *,
        decoder: str = "pyav",
        timeout_s: float = 120.0,
    ) -> None:
        self._reader = ClipReader(decoder=decoder)
        self._timeout_s = timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decode")

    def __enter__(self) -> LocalFrameSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def probe(self, uri: str) -> VideoInfo:
        return await self._run(f"probe of {uri}", lambda: self._reader.probe(uri))

    async def clip(self, uri: str, request: ClipRequest, size: FrameSize) -> Clip:
        return await self._run(describe_clip(uri, request), lambda: self._reader.clip(uri, request, size))

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        return await self._run(f"{len(refs)} frames by reference", lambda: self._reader.resolve(refs))

    async def stats(self) -> ReaderStats:
        return await self._run("statistics", self._reader.stats)

    def close(self) -> None:
        """Close all videos after the current request."""
        self._thread.submit(self._reader.close)
        self._thread.shutdown(wait=True)

    async def _run(self, operation: str, call: Callable[[], T]) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._thread, call)
        return await with_timeout(future, self._timeout_s, target="the decoding thread", operation=operation)
