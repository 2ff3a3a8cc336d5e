"""Zooms that the client carries out, or lets be carried out, one by one.

A request that offers the tool `video_zoom` gets the agent's next zoom as a tool call in place of a clip. The
client sends it back with a reply: frames of its own, each with its time, or nothing, and then the server
decodes the clip. What was said so far is played again, without the engine, up to where the agent speaks next.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vz_ray.episode.protocols import FrameSource, Policy, Prompt
from vz_ray.episode.trajectory import Sampled, Sampling, Written
from vz_ray.episode.wire import WireFormat
from vz_ray.video.frame import Chosen, Clip, Frame, FrameRef, FrameSize, Overview, Still, VideoInfo, Zoom

TOOL = "video_zoom"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A zoom that the agent asked for, and what the client said to it.

    Attributes:
        arguments: Of the tool call, JSON.
        reasoning: What the agent had said before it.
        pictures: URIs of the frames that the client shows; none lets the server decode the clip.
        times_s: Their times in the video, seconds.
    """

    arguments: str
    reasoning: str = ""
    pictures: tuple[str, ...] = ()
    times_s: tuple[float, ...] = ()

    @property
    def text(self) -> str:
        """The turn as the agent would have said it."""
        return f"<think>{self.reasoning}</think><video_zoom>{self.arguments}</video_zoom>"


class ZoomForClient(Exception):
    """The agent asks for a clip, and the client is to say what it is shown."""

    def __init__(self, zoom: Zoom, several: bool) -> None:
        super().__init__(f"{zoom}")
        self.zoom, self.several = zoom, several

    @property
    def arguments(self) -> str:
        """As in the agent's own call: `{"segment": [8.0, 12.0], "fps": 2.0}`."""
        which = {"video": self.zoom.video + 1} if self.several else {}
        asked = {"segment": [self.zoom.start_s, self.zoom.end_s], "fps": self.zoom.fps}
        return json.dumps({**which, **asked})


@dataclass(slots=True)
class Replayed:
    """A policy that says again what was said, and then speaks for itself."""

    policy: Policy
    wire: WireFormat
    exchanges: Sequence[Exchange]
    said: int = 0
    current: Exchange | None = None
    """What the turn under way was said from; None where the agent speaks for itself."""

    async def act(self, prompt: Prompt, sampling: Sampling, *, request: str) -> Sampled | Written:
        if self.said < len(self.exchanges):
            self.current = self.exchanges[self.said]
            self.said += 1
            return Written(self.current.text, self.wire.written(self.current.text))
        self.current = None
        return await self.policy.act(prompt, sampling, request=request)


@dataclass(slots=True)
class ClientFrames:
    """A frame source that shows what the client sent.

    Attributes:
        stop: At the first zoom that the client has not seen; else that and all further ones are decoded.
    """

    frames: FrameSource
    replayed: Replayed
    videos: Sequence[str]
    stop: bool

    async def zoom(self, uri: str, request: Zoom, size: FrameSize) -> Clip:
        exchange = self.replayed.current
        if exchange is None and self.stop:
            raise ZoomForClient(request, len(self.videos) > 1)
        if exchange is None or not exchange.pictures:
            return await self.frames.zoom(uri, request, size)
        clips = [await self.frames.overview(picture, Still(), size) for picture in exchange.pictures]
        frames = (clip.frames[0] for clip in clips)
        timed = (
            Frame(replace(frame.ref, pts_s=time), frame.rgb)
            for frame, time in zip(frames, exchange.times_s, strict=True)
        )
        return Clip(request, tuple(timed))

    async def probe(self, uri: str) -> VideoInfo:
        return await self.frames.probe(uri)

    async def overview(self, uri: str, request: Overview | Chosen | Still, size: FrameSize) -> Clip:
        return await self.frames.overview(uri, request, size)

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        return await self.frames.resolve(refs)
