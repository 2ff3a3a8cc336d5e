"""State machine of the zooming environment, driven turn by turn without an engine."""

from __future__ import annotations

import json

import pytest

from tests.env.conftest import GRID, make_clip
from vz_ray.config.episode import EpisodeConfig
from vz_ray.env.serialization import trajectory_from_dict, trajectory_to_dict
from vz_ray.env.task import Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    RejectedZoom,
    SampledAction,
    SamplingParams,
    VersionSpan,
    ZoomErrorKind,
)
from vz_ray.env.zoom_env import EnvState, ZoomEnv

TASK = Task("t", "v.mp4", "What flashes?", "A")
ZOOM = '<think>there</think><video_zoom>{"segment": [8.00, 16.00], "fps": 1}</video_zoom>'
ANSWER = "<think>disc</think><answer>A</answer>"


def sampled(chat_format, text: str, *, end: bool = True, stop: str = "end") -> SampledAction:
    ids = tuple(chat_format.tokenizer.encode(text, add_special_tokens=False)) + ((chat_format.end_id,) if end else ())
    return SampledAction(ids, (-0.5,) * len(ids), (VersionSpan(0, len(ids), 3),), SamplingParams(), stop)


def start_env(chat_format, video, **config) -> ZoomEnv:
    env = ZoomEnv(EpisodeId(0, "t", 0), TASK, video, chat_format, EpisodeConfig(**config))
    env.start(make_clip([0.0, 8.0, 16.0, 24.0]))
    return env


def zoom_once(env, chat_format):
    zoom = env.step(sampled(chat_format, ZOOM, end=False, stop="zoom"))
    env.add_clip(make_clip([8.0 + i for i in range(zoom.num_frames)], zoom))


def check_invariants(trajectory, chat_format):
    slots = trajectory.expanded_ids.count(chat_format.pad_id)
    assert slots == sum(GRID.num_visual_tokens(grid) for grid in trajectory.grids)
    assert len(trajectory.frame_refs) == len(trajectory.grids)
    compact = sum(c.compact_ids.count(chat_format.pad_id) for c in trajectory.contexts)
    assert compact == len(trajectory.frame_refs)
    assert len(trajectory.loss_mask) == len(trajectory.expanded_ids)
    learned = [i for i, on in zip(trajectory.expanded_ids, trajectory.loss_mask, strict=False) if on]
    assert learned == [i for turn in trajectory.turns for i in turn.action.token_ids]
    assert len(trajectory.sampled_logprobs) == sum(trajectory.loss_mask)


def test_zoom_then_answer(chat_format, video):
    env = start_env(chat_format, video)
    zoom_once(env, chat_format)
    assert env.step(sampled(chat_format, ANSWER)) is None
    trajectory = env.trajectory(worker="w0", seconds=1.0)
    assert (trajectory.status, trajectory.answer) == (EpisodeStatus.ANSWERED, "A")
    assert (len(trajectory.zooms), trajectory.num_zoom_calls, len(trajectory.frame_refs)) == (1, 1, 12)
    assert trajectory.weight_versions == (3,)
    check_invariants(trajectory, chat_format)


def test_fixed_fps_is_applied_and_requested_fps_recorded(chat_format, video):
    env = start_env(chat_format, video, zoom_fps=0.5)
    zoom_once(env, chat_format)
    env.step(sampled(chat_format, ANSWER))
    trajectory = env.trajectory()
    (zoom,) = trajectory.zooms
    assert (zoom.fps, zoom.num_frames, len(trajectory.frame_refs)) == (0.5, 4, 8)
    assert [turn.requested_fps for turn in trajectory.turns] == [1.0, None]
    assert '"fps": 1' in trajectory.turns[0].text
    assert trajectory_from_dict(json.loads(json.dumps(trajectory_to_dict(trajectory)))) == trajectory
    check_invariants(trajectory, chat_format)


def test_prompt_is_the_exact_token_history(chat_format, video):
    env = start_env(chat_format, video)
    action = sampled(chat_format, ZOOM, end=False, stop="zoom")
    before = env.prompt.compact_ids
    zoom = env.step(action)
    env.add_clip(make_clip([8.0 + i for i in range(zoom.num_frames)], zoom))
    after = env.prompt.compact_ids
    assert after[: len(before)] == before
    assert after[len(before) : len(before) + len(action.token_ids)] == action.token_ids
    text = chat_format.tokenizer.decode(list(after[len(before) :]))
    assert text.startswith(
        ZOOM + "<|im_end|>\n<|im_start|>user\n<tool_response><|vision_start|><|image_pad|><|vision_end|>8.00"
    )
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("end", [True, False])
def test_only_a_sampled_end_token_is_in_the_loss_mask(chat_format, video, end):
    env = start_env(chat_format, video)
    zoom = env.step(sampled(chat_format, ZOOM, end=end, stop="end" if end else "zoom"))
    env.add_clip(make_clip([8.0], zoom))
    env.step(sampled(chat_format, ANSWER))
    trajectory = env.trajectory()
    check_invariants(trajectory, chat_format)
    ends = [on for i, on in zip(trajectory.expanded_ids, trajectory.loss_mask, strict=False) if i == chat_format.end_id]
    # end tokens of: system turn, user turn, zoom, observation, answer
    assert ends == [0, 0, int(end), 0, 1]


def test_rejected_zoom_adds_an_error_message(chat_format, video):
    env = start_env(chat_format, video)
    assert env.step(sampled(chat_format, ZOOM.replace("8.00", "80.00", 1))) is None
    assert env.state is EnvState.AWAITING_TURN
    assert "is reversed" in chat_format.tokenizer.decode(list(env.prompt.compact_ids))
    env.step(sampled(chat_format, ANSWER))
    trajectory = env.trajectory()
    rejected = trajectory.turns[0].zoom
    assert isinstance(rejected, RejectedZoom)
    assert rejected.requested.start_s == 80
    assert (trajectory.num_zoom_calls, len(trajectory.zooms)) == (1, 0)
    check_invariants(trajectory, chat_format)


def test_decode_error_adds_an_error_message(chat_format, video):
    env = start_env(chat_format, video)
    zoom = env.step(sampled(chat_format, ZOOM))
    env.add_decode_error("the video is damaged here")
    env.step(sampled(chat_format, ANSWER))
    rejected = env.trajectory().turns[0].zoom
    assert (rejected.kind, rejected.requested) == (ZoomErrorKind.DECODE_ERROR, zoom)


def test_last_round_has_notice_and_rejects_zoom(chat_format, video):
    env = start_env(chat_format, video, max_rounds=3)
    zoom_once(env, chat_format)
    assert "Answer now" not in chat_format.tokenizer.decode(list(env.prompt.compact_ids))
    zoom_once(env, chat_format)
    assert chat_format.tokenizer.decode(list(env.prompt.compact_ids)).count("Answer now") == 1
    assert env.step(sampled(chat_format, ZOOM)) is None
    trajectory = env.trajectory()
    assert trajectory.status is EpisodeStatus.NO_ANSWER
    assert trajectory.turns[-1].zoom.kind is ZoomErrorKind.LAST_ROUND
    assert trajectory.turns[-1].zoom.requested == trajectory.turns[0].zoom
    check_invariants(trajectory, chat_format)


def test_image_budget_rejects_zoom_before_decoding(chat_format, video):
    env = start_env(chat_format, video, max_images=10, overview_frames=10)
    assert env.step(sampled(chat_format, ZOOM)) is None
    assert env.turns[0].zoom.kind is ZoomErrorKind.BUDGET_EXCEEDED
    assert "only 6 more frames" in env.turns[0].zoom.message
    assert env.turns[0].zoom.requested.start_s == 8


def test_clip_beyond_context_is_dropped_atomically(chat_format, video):
    max_context = len(start_env(chat_format, video).prompt.compact_ids) + 160
    env = start_env(chat_format, video, max_context=max_context)
    zoom = env.step(sampled(chat_format, ZOOM, end=False, stop="zoom"))
    env.add_clip(make_clip([8.0 + i for i in range(8)], zoom, width=112, height=112))
    assert env.turns[0].zoom.kind is ZoomErrorKind.BUDGET_EXCEEDED
    assert env.turns[0].zoom.requested == zoom
    assert len(env.prompt.frames) == 4
    env.step(sampled(chat_format, ANSWER))
    check_invariants(env.trajectory(), chat_format)
    assert len(env.trajectory().expanded_ids) <= max_context


def test_turn_tokens_are_limited_by_context(chat_format, video):
    length = len(start_env(chat_format, video).prompt.compact_ids)
    env = start_env(chat_format, video, max_context=length + 20)
    assert env.turn_sampling_params(SamplingParams(max_tokens=500)).max_tokens == 20


def test_truncated_turn_ends_the_episode(chat_format, video):
    env = start_env(chat_format, video)
    env.step(sampled(chat_format, "<think>disc disc disc", end=False, stop="length"))
    assert env.trajectory().status is EpisodeStatus.TRUNCATED


def test_frame_sizes_determine_visual_tokens(chat_format, video):
    env = ZoomEnv(EpisodeId(0, "t", 0), TASK, video, chat_format, EpisodeConfig())
    env.start(make_clip([0.0, 8.0], width=56, height=84))
    zoom = env.step(sampled(chat_format, ZOOM))
    env.add_clip(make_clip([8.0], zoom, width=28, height=56))
    env.step(sampled(chat_format, ANSWER))
    trajectory = env.trajectory()
    assert [GRID.num_visual_tokens(grid) for grid in trajectory.grids] == [6, 6, 2]
    check_invariants(trajectory, chat_format)


def test_calls_in_wrong_state_raise(chat_format, video):
    env = start_env(chat_format, video)
    with pytest.raises(RuntimeError, match="expected awaiting_clip"):
        env.add_clip(make_clip([1.0]))
    with pytest.raises(RuntimeError, match="expected done"):
        env.trajectory()


def test_single_round_episode_has_notice_in_prompt(chat_format, video):
    prompts = [
        chat_format.decode_turn(start_env(chat_format, video, max_rounds=rounds).prompt.compact_ids)
        for rounds in (1, 2)
    ]
    assert ["Answer now." in text for text in prompts] == [True, False]
