"""Serialization of trajectories."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vz_ray.env.serialization import trajectory_from_dict, trajectory_to_dict
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    RejectedZoom,
    RewardParts,
    SampledAction,
    SamplingParams,
    TokenContext,
    Trajectory,
    Turn,
    VersionSpan,
    ZoomErrorKind,
)
from vz_ray.video.frame import FrameRef, ZoomRequest

number = st.floats(allow_nan=False, allow_infinity=False)
PAD = 151_655
ids = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 200_000)), max_size=30).map(tuple)
refs = st.builds(
    FrameRef,
    video_id=st.sampled_from(["blake3:a", "blake3:b"]),
    uri=st.sampled_from(["/v/a.mp4", "https://example.org/b.mp4"]),
    stream=st.integers(0, 3),
    pts_s=number,
    width=st.sampled_from([28, 56]),
    height=st.just(28),
    scaler=st.just("bicubic"),
    decoder=st.just("av"),
    digest=st.text("0123456789abcdef", min_size=8, max_size=8),
)


@st.composite
def contexts(draw: st.DrawFn) -> TokenContext:
    frames = draw(st.lists(refs, max_size=4))
    grids = tuple((1, draw(st.integers(2, 40)), draw(st.integers(2, 40))) for _ in frames)
    text = [token for token in draw(ids) if token != PAD]
    return TokenContext((*text, *[PAD] * len(frames)), grids, tuple(frames), PAD, merge_size=2)


spans = st.lists(st.builds(VersionSpan, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), max_size=3).map(tuple)
samplings = st.builds(SamplingParams, temperature=number, seed=st.none() | st.integers())
actions = st.builds(
    SampledAction, token_ids=ids, logprobs=st.lists(number, max_size=5).map(tuple), versions=spans,
    sampling_params=samplings, stop_reason=st.sampled_from(["end", "zoom", "length"]),
) | st.builds(ExternalAction, text=st.text(), token_ids=ids)  # fmt: skip
requests = st.builds(ZoomRequest, number, number, number, st.booleans(), st.integers(0, 2))
zooms = st.none() | requests | st.builds(RejectedZoom, st.sampled_from(ZoomErrorKind), st.text(), st.none() | requests)
turns = st.builds(
    Turn,
    action=actions,
    text=st.text(),
    zoom=zooms,
    observation=st.none() | contexts(),
    seconds=st.tuples(number, number),
)
rewards = st.builds(
    RewardParts, number, number, number, number,
    valid=st.booleans(), note=st.text(), extra=st.dictionaries(st.text(), number),
)  # fmt: skip
trajectories = st.builds(
    Trajectory,
    id=st.builds(EpisodeId, st.integers(0, 99), st.text(), st.integers(0, 15), st.integers(0, 3)),
    chat_format=st.text(),
    prompt=contexts(),
    turns=st.lists(turns, max_size=3).map(tuple),
    status=st.sampled_from(EpisodeStatus),
    answer=st.none() | st.text(),
    worker=st.text(),
    seconds=number,
    reward=st.none()
    | st.builds(
        RewardParts,
        number,
        number,
        number,
        number,
        st.booleans(),
        st.text(),
        st.dictionaries(st.text(), number),
    ),
    error=st.text(),
    extra=st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(number)),
)


def through_json(value: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    return read


@settings(deadline=None)
@given(trajectories)
def test_round_trip_is_exact(trajectory: Trajectory) -> None:
    restored = trajectory_from_dict(through_json(trajectory_to_dict(trajectory)))
    assert restored == trajectory
    assert hash(restored.turns) == hash(trajectory.turns)  # hashable: tuples at every level
    assert restored.loss_mask == trajectory.loss_mask


def test_common_frame_fields_are_stored_once() -> None:
    uri = "/a/rather/long/path/to/a/video.mp4"
    frames = tuple(FrameRef("blake3:a", uri, 0, t / 2, 28, 28, "bicubic", "av", "00") for t in range(64))
    prompt = TokenContext((1,) * 64, ((1, 16, 32),) * 64, frames, pad_id=1, merge_size=2)
    text = json.dumps(trajectory_to_dict(Trajectory(EpisodeId(0, "t", 0), "clean", prompt, (), EpisodeStatus.FAILED)))
    assert text.count(uri) == 1
    assert len(text) < 3000


def test_reward_without_extra_parts_is_readable() -> None:
    parts = RewardParts(1.0, 1.0, 1.0, 0.0, note="no extra parts")
    trajectory = Trajectory(EpisodeId(0, "t", 0), "clean", TokenContext(()), (), EpisodeStatus.ANSWERED, reward=parts)
    data = through_json(trajectory_to_dict(trajectory))
    del data["reward"]["extra"]
    assert trajectory_from_dict(data) == trajectory


def test_rejected_zoom_without_request_is_readable() -> None:
    rejected = RejectedZoom(ZoomErrorKind.OUT_OF_RANGE, "outside", ZoomRequest(60.0, 90.0, 1.0))
    turn = Turn(ExternalAction("z", (1,)), "z", rejected, TokenContext((2,)))
    trajectory = Trajectory(EpisodeId(0, "t", 0), "clean", TokenContext(()), (turn,), EpisodeStatus.ANSWERED)
    data = through_json(trajectory_to_dict(trajectory))
    assert trajectory_from_dict(data) == trajectory
    del data["turns"][0]["zoom"]["requested"]
    assert trajectory_from_dict(data).turns[0].zoom == RejectedZoom(ZoomErrorKind.OUT_OF_RANGE, "outside")


def test_unknown_format_version_is_rejected() -> None:
    prompt = TokenContext(())
    data = trajectory_to_dict(Trajectory(EpisodeId(0, "t", 0), "clean", prompt, (), EpisodeStatus.FAILED))
    with pytest.raises(ValueError, match="version 999"):
        trajectory_from_dict({**data, "v": 999})


def test_record_without_merge_size_has_that_of_qwen2_5_vl() -> None:
    frames = (FrameRef("v", "v.mp4", 0, 0.0, 56, 56, "bicubic", "av", "00"),)
    prompt = TokenContext((1, 2), ((1, 4, 4),), frames, pad_id=1, merge_size=2)
    trajectory = Trajectory(EpisodeId(0, "t", 0), "clean", prompt, (), EpisodeStatus.ANSWERED)
    data = trajectory_to_dict(trajectory)
    del data["prompt"]["merge"]
    assert trajectory_from_dict(data) == trajectory


def test_merge_size_is_recorded() -> None:
    frames = (FrameRef("v", "v.mp4", 0, 0.0, 96, 96, "bicubic", "av", "00"),)
    prompt = TokenContext((1, 2), ((1, 6, 6),), frames, pad_id=1, merge_size=3)
    trajectory = Trajectory(EpisodeId(0, "t", 0), "clean", prompt, (), EpisodeStatus.ANSWERED)
    restored = trajectory_from_dict(json.loads(json.dumps(trajectory_to_dict(trajectory))))
    assert restored == trajectory
    assert restored.num_tokens == len(restored.expanded_ids) == 5
