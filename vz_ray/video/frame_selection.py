"""Query-based frame selection: relevance, coverage of the video, and diversity. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vz_ray.video.frame import FrameSize, OverviewRequest

Features = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SelectionParams:
    """Parameters of frame selection.

    Attributes:
        size: Size at which the candidates are encoded.
        segments: Share of `max_frames` selected as the best frame of each equal part of the video.
        diversity: Weight of dissimilarity to selected frames, against relevance, for the other frames.
    """

    candidates: OverviewRequest
    size: FrameSize
    max_frames: int
    segments: float = 0.25
    diversity: float = 0.3


def select_frames(relevance: Features, features: Features, params: SelectionParams) -> list[int]:
    """Return the ascending indices of the selected candidates; all of them if there are few.

    The most relevant candidate of each segment is selected first. Maximal marginal relevance
    (Carbonell and Goldstein, 1998) selects the others: each maximizes (1 - diversity) * relevance -
    diversity * similarity to the most similar selected frame. Relevance and similarity are scaled
    to [0, 1] per video, because image-text models use a narrow range.

    Args:
        relevance: `[n]`, larger means more similar to the question.
        features: `[n, d]`, normalized.
    """
    count = len(relevance)
    if count <= params.max_frames:
        return list(range(count))
    score, similarity = _scale(relevance), _scale(features @ features.T)
    selected: list[int] = []
    num_segments = round(params.segments * params.max_frames)
    for segment in range(num_segments):
        start, end = segment * count // num_segments, (segment + 1) * count // num_segments
        selected.append(start + int(np.argmax(score[start:end])))
    max_similarity = similarity[selected].max(axis=0) if selected else np.zeros(count, np.float32)
    while len(selected) < params.max_frames:
        marginal = (1 - params.diversity) * score - params.diversity * max_similarity
        marginal[selected] = -np.inf
        best = int(np.argmax(marginal))
        selected.append(best)
        max_similarity = np.maximum(max_similarity, similarity[best])
    return sorted(selected)


def _scale(values: Features) -> Features:
    low, high = float(values.min()), float(values.max())
    scaled: Features = ((values - low) / max(high - low, 1e-12)).astype(np.float32)
    return scaled
