"""Choosing candidates by relevance, spread and difference."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vz_ray.video.frame import FrameSize, OverviewRequest
from vz_ray.video.frame_selection import SelectionParams, select_frames


def search(most: int, segments: float = 0.0, diversity: float = 0.0) -> SelectionParams:
    return SelectionParams(OverviewRequest(), FrameSize(), most, segments, diversity)


def directions(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


RELEVANCE = np.array([0.9, 0.89, 0.6, 0.2], np.float32)
TWINS = directions(0, 1, 60, 90)


def test_without_diversity_the_most_relevant_are_chosen():
    assert select_frames(RELEVANCE, TWINS, search(2)) == [0, 1]


def test_with_diversity_a_twin_gives_way_to_something_else():
    assert select_frames(RELEVANCE, TWINS, search(2, diversity=0.5)) == [0, 2]


def test_every_segment_shows_its_best_frame():
    relevance = np.array([0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.0, 0.3], np.float32)
    chosen = select_frames(relevance, directions(*range(8)), search(4, segments=0.5))
    assert chosen == [0, 1, 2, 7]


def test_no_more_candidates_than_wanted_are_all_shown():
    assert select_frames(RELEVANCE, TWINS, search(4)) == [0, 1, 2, 3]


@given(st.integers(1, 60), st.integers(1, 20), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_what_is_chosen_is_distinct_in_order_and_as_many_as_asked(count, most, segments, diversity, seed):
    draw = np.random.default_rng(seed)
    features = draw.normal(size=(count, 4)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    asked = search(most, segments, diversity)
    chosen = select_frames(draw.normal(size=count).astype(np.float32), features, asked)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, most)
