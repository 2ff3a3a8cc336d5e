"""User-defined frame selectors: a valid one, and one for each contract violation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vz_ray.video.frame import VideoInfo


def ends(video: VideoInfo, question: str, max_frames: int) -> Sequence[float]:
    return [0.0, video.duration_s]


def too_many(video: VideoInfo, question: str, max_frames: int) -> Sequence[float]:
    return [k / 10 for k in range(max_frames + 1)]


def unsorted(video: VideoInfo, question: str, max_frames: int) -> Sequence[float]:
    return [2.0, 1.0]


def twice(video: VideoInfo, question: str, max_frames: int) -> Sequence[float]:
    return [1.0, 1.0]


def not_finite(video: VideoInfo, question: str, max_frames: int) -> Sequence[float]:
    return [1.0, math.nan]


def outside(video: VideoInfo, question: str, max_frames: int) -> Sequence[float]:
    return [1.0, video.duration_s + 1]


def negative(video: VideoInfo, question: str, max_frames: int) -> Sequence[float]:
    return [-1.0]


def nothing(video: VideoInfo, question: str, max_frames: int) -> Sequence[float]:
    return []


def not_a_sequence(video: VideoInfo, question: str, max_frames: int) -> object:
    return None


def fails(video: VideoInfo, question: str, max_frames: int) -> Sequence[float]:
    raise LookupError(f"no scenes of {question}")


def takes_two_arguments(video: VideoInfo, question: str) -> Sequence[float]:
    return [0.0]
