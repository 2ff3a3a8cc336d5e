"""What passes between the decoder and everything that looks at video."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RGB = NDArray[np.uint8]
"""`uint8 [height, width, 3]`, C-contiguous, read-only where it is shared."""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """One opened and checked video file.

    Attributes:
        video_id: Identity of the content (`blake3:<hex>`), the same for copies.
        uri: Where it was opened from.
        stream: Index of the video stream that is used.
        duration_s: Seconds from the first frame to the end of the last one.
        fps: Average frame rate; only a hint where the rate varies.
        width: Pixels after rotation metadata is applied.
        height: Pixels after rotation metadata is applied.
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
    """Everything needed to get the same bytes again; carries no pixels.

    Attributes:
        video_id: Identity of the content, as in `VideoInfo`.
        uri: Where to find the file.
        stream: Index of the video stream.
        pts_s: Actual presentation time, seconds from the start of the stream.
        width: Width of the delivered array, pixels.
        height: Height of the delivered array, pixels.
        scaler: Scaler and flags, for example `bicubic+accurate_rnd+bitexact`.
        decoder: Decoder and its version.
        digest: blake3 of the RGB bytes, hex.
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
    """A decoded frame at its final size: nothing downstream resizes it again."""

    ref: FrameRef
    rgb: RGB

    @property
    def pts_s(self) -> float:
        return self.ref.pts_s


@dataclass(frozen=True, slots=True)
class FrameSize:
    """The area, in pixels, that a frame may have, as the model's processor states it.

    The delivered size is the one the Qwen-VL image processor would choose:
    sides are multiples of `factor` (patch side x merge), the area lies within
    the bounds, and the aspect ratio is kept as nearly as these allow.
    """

    min_pixels: int = 25_088
    max_pixels: int = 100_352
    factor: int = 28


@dataclass(frozen=True, slots=True)
class OverviewRequest:
    """A sparse look at the whole video.

    At `fps` frames a second; where that makes more than `max_frames`, that
    many spread evenly, the k-th of n at k / n of the duration (`starts`) or
    from the first frame to the last (`endpoints`, as the released VideoZoomer
    code does). At a rate of infinity it is always `max_frames`, or every frame
    of a video that has fewer.

    With `keyframes`, each frame is moved to a keyframe near it, which can be
    decoded alone; no keyframe is taken twice.
    """

    fps: float = 0.5
    max_frames: int = 64
    spread: str = "starts"
    keyframes: bool = False


@dataclass(frozen=True, slots=True)
class SelectedFramesRequest:
    """An overview whose frames someone has chosen, one by one.

    Attributes:
        times_s: Seconds, ascending; the frame shown at each.
        frame_indices: Native frame numbers from 0, ascending; in place of times.
    """

    times_s: tuple[float, ...] = ()
    frame_indices: tuple[int, ...] = ()

    @property
    def max_frames(self) -> int:
        return len(self.times_s) + len(self.frame_indices)


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """An image file as it is, whatever its name ends with: one frame, at time 0."""

    @property
    def max_frames(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class ZoomRequest:
    """A short, dense look: frames at start + j / fps, j < round-down((end - start) * fps).

    Attributes:
        start_s: Seconds from the start of the video.
        end_s: Seconds, exclusive.
        fps: Frames per second of video time.
        inclusive: Spread the frames from start to end inclusive, by native
            frame index, as the released VideoZoomer code does.
        video: Which of the episode's videos, from 0.
    """

    start_s: float
    end_s: float
    fps: float
    inclusive: bool = False
    video: int = 0

    @property
    def num_frames(self) -> int:
        """How many frames this asks for; a hair of tolerance for 0.1 * 30."""
        return int((self.end_s - self.start_s) * self.fps + 1e-6)


@dataclass(frozen=True, slots=True)
class Clip:
    """Ordered frames and the request that made them."""

    request: OverviewRequest | SelectedFramesRequest | ImageRequest | ZoomRequest
    frames: tuple[Frame, ...]

    @property
    def refs(self) -> tuple[FrameRef, ...]:
        return tuple(frame.ref for frame in self.frames)


class VideoError(Exception):
    """A video cannot be read as asked.

    `str(error)` is for a person and names the file; `model_message` is short, has
    no path, and can be shown to the model in an error turn.
    """

    def __init__(self, message: str, model_message: str) -> None:
        super().__init__(message)
        self.model_message = model_message

    def __reduce__(self) -> tuple[type[VideoError], tuple[str, str]]:
        return (type(self), (str(self), self.model_message))
