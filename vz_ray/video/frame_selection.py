"""Choosing frames for a question: relevant ones, from everywhere, and not the same thing twice. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vz_ray.video.frame import FrameSize, OverviewRequest

Features = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SelectionParams:
    """How frames are chosen for a question.

    Attributes:
        candidates: The candidates.
        size: At which size they are looked at.
        max_frames: How many to choose.
        segments: Share of them that is spread: the best frame of each of so many equal parts of the grid.
        diversity: Weight of difference from what is chosen already, against relevance, for the rest.
    """

    candidates: OverviewRequest
    size: FrameSize
    max_frames: int
    segments: float = 0.25
    diversity: float = 0.3


def select_frames(relevance: Features, features: Features, params: SelectionParams) -> list[int]:
    """Indices of the chosen candidates, ascending; all of them where there are no more than `most`.

    First the most relevant candidate of each segment, then by maximal marginal
    relevance (Carbonell and Goldstein, 1998): always the candidate with the
    largest (1 - diversity) * relevance - diversity * likeness to the most like
    of those chosen. Both are scaled to [0, 1] within the video, since image-text
    models crowd theirs into a narrow range.

    Args:
        relevance: `[n]`, larger is more like the question.
        features: `[n, d]`, of unit length.
        params: How many, and what counts.
    """
    count = len(relevance)
    if count <= params.max_frames:
        return list(range(count))
    score, alike = _scaled(relevance), _scaled(features @ features.T)
    chosen: list[int] = []
    parts = round(params.segments * params.max_frames)
    for part in range(parts):
        first, end = part * count // parts, (part + 1) * count // parts
        chosen.append(first + int(np.argmax(score[first:end])))
    nearest = alike[chosen].max(axis=0) if chosen else np.zeros(count, np.float32)
    while len(chosen) < params.max_frames:
        worth = (1 - params.diversity) * score - params.diversity * nearest
        worth[chosen] = -np.inf
        best = int(np.argmax(worth))
        chosen.append(best)
        nearest = np.maximum(nearest, alike[best])
    return sorted(chosen)


def _scaled(values: Features) -> Features:
    low, high = float(values.min()), float(values.max())
    scaled: Features = ((values - low) / max(high - low, 1e-12)).astype(np.float32)
    return scaled
