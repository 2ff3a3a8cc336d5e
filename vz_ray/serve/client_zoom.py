"""Zooms that the client carries out, or lets be carried out, one by one.

A request that offers the tool `video_zoom` gets the agent's next zoom as a tool call in place of a clip. The
client sends it back with a reply: frames of its own, each with its time, or nothing, and then the server
decodes the clip. What was said so far is played again, without the engine, up to where the agent speaks next.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.protocols import FrameSource, Policy, Prompt
from vz_ray.env.trajectory import ExternalAction, SampledAction, SamplingParams
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

TOOL_NAME = "video_zoom"


@dataclass(frozen=True, slots=True)
class ReplayedZoom:
    """A zoom that the agent asked for, and what the client said to it.

    Attributes:
        arguments: Of the tool call, JSON.
        reasoning: What the agent had said before it.
        images: URIs of the frames that the client shows; none lets the server decode the clip.
        times_s: Their times in the video, seconds.
    """

    arguments: str
    reasoning: str = ""
    images: tuple[str, ...] = ()
    times_s: tuple[float, ...] = ()

    @property
    def text(self) -> str:
        """The turn as the agent would have said it."""
        return f"<think>{self.reasoning}</think><video_zoom>{self.arguments}</video_zoom>"


class ClientZoomRequired(Exception):
    """The agent asks for a clip, and the client is to say what it is shown."""

    def __init__(self, zoom: ZoomRequest, several: bool) -> None:
        super().__init__(f"{zoom}")
        self.zoom, self.multiple_videos = zoom, several

    @property
    def arguments(self) -> str:
        """As in the agent's own call: `{"segment": [8.0, 12.0], "fps": 2.0}`."""
        which = {"video": self.zoom.video + 1} if self.multiple_videos else {}
        asked = {"segment": [self.zoom.start_s, self.zoom.end_s], "fps": self.zoom.fps}
        return json.dumps({**which, **asked})


@dataclass(slots=True)
class ReplayPolicy:
    """A policy that says again what was said, and then speaks for itself."""

    policy: Policy
    chat_format: ChatFormat
    zooms: Sequence[ReplayedZoom]
    next_index: int = 0
    current: ReplayedZoom | None = None
    """What the turn under way was said from; None where the agent speaks for itself."""

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str
    ) -> SampledAction | ExternalAction:
        if self.next_index < len(self.zooms):
            self.current = self.zooms[self.next_index]
            self.next_index += 1
            return ExternalAction(self.current.text, self.chat_format.encode_assistant(self.current.text))
        self.current = None
        return await self.policy.generate(prompt, sampling_params, request_id=request_id)


@dataclass(slots=True)
class ClientFrameSource:
    """A frame source that shows what the client sent.

    Attributes:
        stop_at_new_zoom: At the first zoom that the client has not seen; else that and all further ones are decoded.
    """

    frames: FrameSource
    replay: ReplayPolicy
    videos: Sequence[str]
    stop_at_new_zoom: bool

    async def zoom(self, uri: str, request: ZoomRequest, size: FrameSize) -> Clip:
        exchange = self.replay.current
        if exchange is None and self.stop_at_new_zoom:
            raise ClientZoomRequired(request, len(self.videos) > 1)
        if exchange is None or not exchange.images:
            return await self.frames.zoom(uri, request, size)
        clips = [await self.frames.overview(picture, ImageRequest(), size) for picture in exchange.images]
        frames = (clip.frames[0] for clip in clips)
        timed = (
            Frame(replace(frame.ref, pts_s=time), frame.rgb)
            for frame, time in zip(frames, exchange.times_s, strict=True)
        )
        return Clip(request, tuple(timed))

    async def probe(self, uri: str) -> VideoInfo:
        return await self.frames.probe(uri)

    async def overview(
        self, uri: str, request: OverviewRequest | SelectedFramesRequest | ImageRequest, size: FrameSize
    ) -> Clip:
        return await self.frames.overview(uri, request, size)

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        return await self.frames.resolve(refs)
