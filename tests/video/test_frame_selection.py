"""Frame selection by relevance, segments and diversity."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vz_ray.video.frame import FrameSize, OverviewRequest
from vz_ray.video.frame_selection import SelectionParams, select_frames


def make_params(max_frames: int, segments: float = 0.0, diversity: float = 0.0) -> SelectionParams:
    return SelectionParams(OverviewRequest(), FrameSize(25_088, 100_352, 28), max_frames, segments, diversity)


def unit_vectors(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


RELEVANCE = np.array([0.9, 0.89, 0.6, 0.2], np.float32)
FEATURES = unit_vectors(0, 1, 60, 90)


def test_zero_diversity_selects_the_most_relevant():
    assert select_frames(RELEVANCE, FEATURES, make_params(2)) == [0, 1]


def test_diversity_skips_near_duplicates():
    assert select_frames(RELEVANCE, FEATURES, make_params(2, diversity=0.5)) == [0, 2]


def test_best_frame_of_each_segment_is_selected():
    relevance = np.array([0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.0, 0.3], np.float32)
    indices = select_frames(relevance, unit_vectors(*range(8)), make_params(4, segments=0.5))
    assert indices == [0, 1, 2, 7]


def test_few_candidates_are_all_selected():
    assert select_frames(RELEVANCE, FEATURES, make_params(4)) == [0, 1, 2, 3]


@given(st.integers(1, 60), st.integers(1, 20), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_indices_are_distinct_ordered_and_complete(count, max_frames, segments, diversity, seed):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 4)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    params = make_params(max_frames, segments, diversity)
    indices = select_frames(rng.normal(size=count).astype(np.float32), features, params)
    assert indices == sorted(set(indices))
    assert len(indices) == min(count, max_frames)
