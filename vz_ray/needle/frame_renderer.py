"""Renderer of needle videos: the frame at any time and size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vz_ray.needle.needle_video import NeedleVideo, VisibleSpan

SYMBOL_RGB = {
    "disc": (255, 130, 20),
    "cross": (40, 210, 70),
    "square": (60, 110, 255),
    "triangle": (250, 230, 40),
    "ring": (250, 60, 210),
    "diamond": (60, 230, 235),
}
BORDER_RGB = {"red": (230, 35, 35), "white": (250, 250, 250), "blue": (35, 50, 235), "yellow": (245, 215, 20)}
NIGHT_RGB = (8, 10, 40)


@lru_cache(maxsize=64)
def _mask(name: str, side: int) -> NDArray[np.float32]:
    """Return the coverage of a shape, `[side, side, 1]` in [0, 1], anti-aliased over 4 x 4 subpixels."""
    fine = (np.arange(side * 4) + 0.5) / (side * 4) - 0.5
    y, x = np.meshgrid(fine, fine, indexing="ij")
    radius = np.hypot(x, y)
    shapes = {
        "disc": radius < 0.24,
        "ring": (radius < 0.28) & (radius > 0.17),
        "square": np.maximum(abs(x), abs(y)) < 0.21,
        "diamond": abs(x) + abs(y) < 0.29,
        "cross": (np.minimum(abs(x), abs(y)) < 0.07) & (np.maximum(abs(x), abs(y)) < 0.28),
        "triangle": (y < 0.22) & (y > -0.26 + 2.0 * abs(x)),
        "border": np.maximum(abs(x), abs(y)) > 0.39,
    }
    blocks = shapes[name].reshape(side, 4, side, 4).mean(axis=(1, 3), dtype=np.float32)
    mask: NDArray[np.float32] = blocks[:, :, None]
    return mask


def _paint(image: NDArray[np.float32], name: str, rgb: tuple[int, int, int], strength: float = 1.0) -> None:
    cover = _mask(name, image.shape[0]) * strength
    image += cover * (np.asarray(rgb, np.float32) - image)


@lru_cache(maxsize=256)
def _background(seed: int, shot: int, side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the first and last background of a shot, `[side, side, 3]`: blurred blobs in muted colors."""
    rng = np.random.default_rng((seed, shot))
    grid = (np.arange(side) + 0.5) / side
    y, x = np.meshgrid(grid, grid, indexing="ij")
    base = rng.uniform(70, 150) + rng.uniform(-25, 25, 3)
    images = []
    for _ in range(2):
        image = np.broadcast_to(base, (side, side, 3)).astype(np.float32)
        for cx, cy, width in rng.uniform((0, 0, 0.1), (1, 1, 0.5), (3, 3)):
            blob = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * width**2))
            image = image + blob[:, :, None] * rng.uniform(-30, 30, 3)
        images.append(image.astype(np.float32))
    return images[0], images[1]


def _span_at(spans: Sequence[VisibleSpan], time_s: float) -> VisibleSpan | None:
    return next((span for span in spans if span.covers(time_s)), None)


def render_frames(video: NeedleVideo, times_s: Sequence[float], side: int) -> NDArray[np.uint8]:
    """Render the frames at `times_s`, RGB `uint8 [n, side, side, 3]`."""
    frames = np.empty((len(times_s), side, side, 3), np.uint8)
    for i, time_s in enumerate(times_s):
        shot = int(time_s / video.shot_s)
        first, last = _background(video.seed, shot, side)
        phase = np.float32(time_s / video.shot_s - shot)
        image = first + phase * (last - first)
        if _span_at(video.nights, time_s):
            image += np.float32(0.8) * (np.asarray(NIGHT_RGB, np.float32) - image)
        if flash := _span_at(video.flashes, time_s):
            _paint(image, flash.name, SYMBOL_RGB[flash.name])
        if border := _span_at(video.borders, time_s):
            _paint(image, "border", BORDER_RGB[border.name])
        frames[i] = np.clip(image, 0, 255)
    return frames
