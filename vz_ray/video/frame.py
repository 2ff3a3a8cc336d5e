"""Data types of the video package: frames, references, requests and clips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

RGB = NDArray[np.uint8]
"""`uint8 [height, width, 3]`, C-contiguous, read-only if shared."""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Properties of a validated video file.

    Attributes:
        video_id: Content hash (`blake3:<hex>`), equal for copies.
        stream: Index of the video stream that is read.
        duration_s: Time from the first frame to the end of the last frame, seconds.
        fps: Average frame rate; a hint only if the rate varies.
        width: Width after rotation, pixels.
        height: Height after rotation, pixels.
    """

    video_id: str
    uri: str
    stream: int
    duration_s: float
    fps: float
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class FrameRef:
    """Reference that reproduces a frame byte for byte. It contains no pixels.

    Attributes:
        video_id: Content hash, as in `VideoInfo`.
        pts_s: Presentation time of the frame, seconds from the start of the stream.
        width: Width of the array, pixels.
        height: Height of the array, pixels.
        scaler: Scaler and flags, for example `bicubic+accurate_rnd+bitexact`.
        decoder: Decoder and version.
        digest: blake3 hash of the RGB bytes, hex.
    """

    video_id: str
    uri: str
    stream: int
    pts_s: float
    width: int
    height: int
    scaler: str
    decoder: str
    digest: str


@dataclass(frozen=True, slots=True)
class Frame:
    """Decoded frame at its final size."""

    ref: FrameRef
    rgb: RGB

    @property
    def pts_s(self) -> float:
        return self.ref.pts_s


@dataclass(frozen=True, slots=True)
class FrameSize:
    """Bounds on the area of a frame, in the terms of the model's image processor.

    Frames are resized as the Qwen-VL image processor does: sides are multiples of `factor` (patch
    size x merge size), the area is within the bounds, and the aspect ratio changes as little as
    possible.

    Attributes:
        min_pixels: Minimum area, pixels.
        max_pixels: Maximum area, pixels.
        factor: Divisor of both sides, pixels; see `ImageGrid.side`.
    """

    min_pixels: int
    max_pixels: int
    factor: int


@dataclass(frozen=True, slots=True)
class OverviewRequest:
    """Sparse frames of the whole video.

    Attributes:
        fps: Frames per second of video time. Infinity selects `max_frames`, or all frames of a
            shorter video.
        max_frames: Maximum number of frames. A longer video is sampled evenly.
        spread: Even sampling beyond `max_frames`: `starts` places frame k of n at k / n of the
            duration, `endpoints` spans the first to the last frame (released VideoZoomer code).
        keyframes: Move each frame to a nearby keyframe, which decodes alone. Keyframes are distinct.
    """

    fps: float = 0.5
    max_frames: int = 64
    spread: str = "starts"
    keyframes: bool = False


@dataclass(frozen=True, slots=True)
class SelectedFramesRequest:
    """Overview of explicitly selected frames.

    Attributes:
        times_s: Ascending times, seconds.
        frame_indices: Ascending indices of native frames; an alternative to times.
    """

    times_s: tuple[float, ...] = ()
    frame_indices: tuple[int, ...] = ()

    @property
    def max_frames(self) -> int:
        return len(self.times_s) + len(self.frame_indices)


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """An image file, regardless of its suffix: one frame at time 0."""

    @property
    def max_frames(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class ZoomRequest:
    """Dense frames of a segment: start + j / fps for j < floor((end - start) * fps).

    Attributes:
        start_s: Start, seconds from the start of the video.
        end_s: End, exclusive, seconds.
        fps: Frames per second of video time.
        inclusive: Sample from start to end inclusive by native frame index (released VideoZoomer code).
        video: Index of the video in the episode.
    """

    start_s: float
    end_s: float
    fps: float
    inclusive: bool = False
    video: int = 0

    @property
    def num_frames(self) -> int:
        """Number of frames, with a tolerance for rounding (0.1 * 30)."""
        return int((self.end_s - self.start_s) * self.fps + 1e-6)


ClipRequest: TypeAlias = OverviewRequest | SelectedFramesRequest | ImageRequest | ZoomRequest


def describe_clip(uri: str, request: ClipRequest) -> str:
    """Describe a request in errors and logs."""
    if isinstance(request, ZoomRequest):
        return f"zoom of {uri} [{request.start_s:g}, {request.end_s:g}] at {request.fps:g} fps"
    return f"overview of {uri}"


@dataclass(frozen=True, slots=True)
class Clip:
    """Ordered frames and the request that produced them."""

    request: ClipRequest
    frames: tuple[Frame, ...]

    @property
    def refs(self) -> tuple[FrameRef, ...]:
        return tuple(frame.ref for frame in self.frames)
