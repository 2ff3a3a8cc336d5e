"""Tokens of an episode, and an iteration's arithmetic, with numbers small enough to follow."""

from __future__ import annotations

import pytest

from vz_ray.config.episode import EpisodeConfig
from vz_ray.planning.episode_budget import (
    CLIP_TEXT_TOKENS,
    FRAME_LABEL_TOKENS,
    PROMPT_TOKENS,
    FrameBudget,
    episode_budget,
    longest_episode,
)
from vz_ray.planning.learner_flops import (
    ComputeRate,
    PassCounts,
    packed_forward,
    packed_work,
    split_group,
    unpacked_forward,
    unpacked_work,
)
from vz_ray.planning.model_flops import FROZEN_BACKWARD_FACTOR, causal_pairs, head_flops, text_flops
from vz_ray.planning.model_shape import KNOWN_SHAPES

SHAPE = KNOWN_SHAPES["Qwen2.5-VL-7B"]
PAPER = EpisodeConfig()


def usual(**changes: int) -> object:
    return episode_budget(PAPER, SHAPE.vision, **({"zooms": 2, "turn_tokens": 170} | changes))


def test_the_papers_frame_is_128_tokens_of_512_patches() -> None:
    frame = FrameBudget.largest(PAPER, SHAPE.vision)
    assert (frame.tokens, frame.patches) == (128, 512)
    assert (frame.rows, frame.columns) == (16, 32)


@pytest.mark.parametrize(("pixels", "tokens"), [(784, 1), (5 * 784, 4), (100 * 784, 100)])
def test_a_frame_is_no_larger_than_allowed_and_no_strip(pixels: int, tokens: int) -> None:
    frame = FrameBudget.largest(EpisodeConfig(min_pixels=784, max_pixels=pixels), SHAPE.vision)
    assert frame.tokens == tokens
    assert max(frame.rows, frame.columns) <= 4 * min(frame.rows, frame.columns)


def test_a_usual_episode_adds_up() -> None:
    found = usual()
    slot = 128 + FRAME_LABEL_TOKENS
    assert found.prefix == PROMPT_TOKENS + 64 * slot
    assert found.tokens == found.prefix + 32 * slot + 2 * CLIP_TEXT_TOKENS + 3 * 170
    assert found.uncut == found.tokens
    assert found.prefix + found.branch == found.tokens


def test_zooms_are_limited_by_rounds_and_by_images() -> None:
    assert usual(zooms=9).frames == 128
    few = EpisodeConfig(max_images=70)
    assert episode_budget(few, SHAPE.vision, zooms=4, turn_tokens=1).zoom_frames == 6


def test_the_longest_episode_is_cut_to_the_context() -> None:
    most = longest_episode(PAPER, SHAPE.vision)
    assert most.tokens == PAPER.max_context < most.untruncated_tokens
    assert most.sampled_tokens == 5 * 4096


def test_an_overview_that_fills_the_context_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"episode\.overview_frames"):
        longest_episode(EpisodeConfig(max_context=4096), SHAPE.vision)


@pytest.mark.parametrize(
    ("budget", "expected"), [(10**9, [16]), (32_768, [4, 4, 4, 4]), (14_904, [1] * 16), (9, [1] * 16)]
)
def test_a_group_is_packed_into_as_few_sequences_as_hold_it(budget: int, expected: list[int]) -> None:
    found = split_group(usual(), 16, budget)
    assert found == expected
    episode = usual()
    assert all(episode.prefix + n * episode.branch <= budget for n in found if n > 1)


def test_one_branch_is_a_sequence_of_its_own() -> None:
    assert packed_forward(SHAPE, usual(), 1) == unpacked_forward(SHAPE, usual())


def test_text_and_logits_of_one_trajectory() -> None:
    episode = usual()
    forward = unpacked_forward(SHAPE, episode)
    together = text_flops(SHAPE, episode.tokens, causal_pairs(episode.tokens))
    assert forward.text + forward.attention == together
    assert forward.head == head_flops(SHAPE, episode.sampled)
    # A weight costs two operations a token; attention adds a quarter or less at such lengths.
    plain = 2 * episode.tokens * SHAPE.text.layers * SHAPE.text.layer_weights
    assert plain == forward.text < together < 1.25 * plain


def test_passes_are_counted_as_they_are_made() -> None:
    forward = unpacked_forward(SHAPE, usual())
    text, vision, head = forward.text + forward.attention, forward.vision, forward.head
    plain = PassCounts(updates=1, forward_only=0, checkpointing=False)
    assert plain.model_flops(forward) == 3 * (text + vision + head)
    # Chunked logits are made again in the backward pass.
    assert plain.executed_flops(forward) == 3 * (text + vision) + 4 * head
    full = PassCounts(updates=2, forward_only=2, checkpointing=True, vision_backward_factor=0)
    assert full.executed_flops(forward) == 2 * (4 * text + vision + 4 * head) + 2 * forward.total


def test_adapters_need_no_gradients_of_the_weights_under_them() -> None:
    forward = unpacked_forward(SHAPE, usual())
    passes = PassCounts(
        updates=1,
        forward_only=0,
        checkpointing=False,
        text_backward_factor=FROZEN_BACKWARD_FACTOR,
        vision_backward_factor=0,
    )
    matrices, attention = forward.text + forward.head, forward.attention
    assert passes.model_flops(forward) == 2 * matrices + 3 * attention + forward.vision


def test_shared_prefixes_save_what_is_shared() -> None:
    passes, rate = PassCounts(1, 2, True), ComputeRate(num_gpus=8, peak_flops=989e12, mfu=0.35)
    episode = usual()
    apart = unpacked_work(SHAPE, episode, 128 * 16, passes, rate)
    whole = packed_work(SHAPE, episode, 128, 16, 10**9, passes, rate)
    split = packed_work(SHAPE, episode, 128, 16, 32_768, passes, rate)
    assert apart.tokens - whole.tokens == 128 * 15 * episode.prefix
    assert whole.executed_flops < split.executed_flops < apart.executed_flops
    none = packed_work(SHAPE, episode, 128, 16, episode.tokens, passes, rate)
    assert none == apart
    assert apart.seconds == pytest.approx(apart.executed_flops / (8 * 989e12 * 0.35))
