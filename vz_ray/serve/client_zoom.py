"""Zooms that the client executes, one tool call at a time.

A request that offers the tool `video_zoom` receives the agent's next zoom as a tool call instead of the
server decoding the clip. The client replies either with its own frames and their times, or with nothing,
and then the server decodes the clip. Earlier turns are replayed without sampling.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.protocols import FrameSource, Policy, Prompt
from vz_ray.env.trajectory import ExternalAction, SampledAction, SamplingParams
from vz_ray.video.frame import Clip, ClipRequest, Frame, FrameRef, FrameSize, ImageRequest, VideoInfo, ZoomRequest

TOOL_NAME = "video_zoom"


@dataclass(frozen=True, slots=True)
class ReplayedZoom:
    """A zoom call of the agent and the client's reply.

    Attributes:
        arguments: Arguments of the tool call, JSON.
        reasoning: Text of the turn before the call.
        images: URIs of the client's frames; empty lets the server decode the clip.
        times_s: Times of the client's frames in the video, seconds.
    """

    arguments: str
    reasoning: str = ""
    images: tuple[str, ...] = ()
    times_s: tuple[float, ...] = ()

    @property
    def text(self) -> str:
        """The turn in the agent's own format."""
        return f"<think>{self.reasoning}</think><video_zoom>{self.arguments}</video_zoom>"


class ClientZoomRequired(Exception):
    """The agent requested a clip that the client must provide."""

    def __init__(self, zoom: ZoomRequest, multiple_videos: bool) -> None:
        super().__init__(f"{zoom}")
        self.zoom, self.multiple_videos = zoom, multiple_videos

    @property
    def arguments(self) -> str:
        """Arguments in the agent's call format: `{"segment": [8.0, 12.0], "fps": 2.0}`."""
        video = {"video": self.zoom.video + 1} if self.multiple_videos else {}
        return json.dumps({**video, "segment": [self.zoom.start_s, self.zoom.end_s], "fps": self.zoom.fps})


@dataclass(slots=True)
class ReplayPolicy:
    """Policy that replays earlier zoom calls, then generates with `policy`.

    Attributes:
        next_index: Index of the next zoom to replay.
        current: The zoom replayed in the current turn; None if the turn was sampled.
    """

    policy: Policy
    chat_format: ChatFormat
    zooms: Sequence[ReplayedZoom]
    next_index: int = 0
    current: ReplayedZoom | None = None

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
    """Frame source that returns the client's frames for replayed zooms.

    Attributes:
        frames: Decodes all other requests.
        replay: Policy that knows which zoom the current turn replays.
        videos: URIs of the task's videos.
        stop_at_new_zoom: Raise `ClientZoomRequired` at the first zoom that is not replayed; if False,
            decode it.
    """

    frames: FrameSource
    replay: ReplayPolicy
    videos: Sequence[str]
    stop_at_new_zoom: bool

    async def clip(self, uri: str, request: ClipRequest, size: FrameSize) -> Clip:
        if not isinstance(request, ZoomRequest):
            return await self.frames.clip(uri, request, size)
        replayed = self.replay.current
        if replayed is None and self.stop_at_new_zoom:
            raise ClientZoomRequired(request, len(self.videos) > 1)
        if replayed is None or not replayed.images:
            return await self.frames.clip(uri, request, size)
        clips = [await self.frames.clip(image, ImageRequest(), size) for image in replayed.images]
        frames = (clip.frames[0] for clip in clips)
        timed_frames = (
            Frame(replace(frame.ref, pts_s=time_s), frame.rgb)
            for frame, time_s in zip(frames, replayed.times_s, strict=True)
        )
        return Clip(request, tuple(timed_frames))

    async def probe(self, uri: str) -> VideoInfo:
        return await self.frames.probe(uri)

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        return await self.frames.resolve(refs)
