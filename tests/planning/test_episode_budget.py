"""Token budgets of an episode and FLOPs of a step against hand-computed values."""

from __future__ import annotations

import pytest

from vz_ray.config.episode import EpisodeConfig
from vz_ray.families import load_model_shape
from vz_ray.planning.episode_budget import (
    CLIP_TEXT_TOKENS,
    FRAME_LABEL_TOKENS,
    PROMPT_TOKENS,
    EpisodeBudget,
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

SHAPE = load_model_shape("Qwen2.5-VL-7B")
PAPER = EpisodeConfig()


def typical_episode(**changes: int) -> EpisodeBudget:
    return episode_budget(PAPER, SHAPE.vision, **({"zooms": 2, "turn_tokens": 170} | changes))


def test_paper_frame_has_128_tokens() -> None:
    frame = FrameBudget.largest(PAPER, SHAPE.vision)
    assert (frame.tokens, frame.patches) == (128, 512)
    assert (frame.rows, frame.columns) == (16, 32)


@pytest.mark.parametrize(("pixels", "tokens"), [(784, 1), (5 * 784, 4), (100 * 784, 100)])
def test_largest_frame_respects_area_and_aspect(pixels: int, tokens: int) -> None:
    frame = FrameBudget.largest(EpisodeConfig(min_pixels=784, max_pixels=pixels), SHAPE.vision)
    assert frame.tokens == tokens
    assert max(frame.rows, frame.columns) <= 4 * min(frame.rows, frame.columns)


def test_typical_episode_adds_up() -> None:
    episode = typical_episode()
    tokens_per_frame = 128 + FRAME_LABEL_TOKENS
    assert episode.prefix_tokens == PROMPT_TOKENS + 64 * tokens_per_frame
    assert episode.tokens == episode.prefix_tokens + 32 * tokens_per_frame + 2 * CLIP_TEXT_TOKENS + 3 * 170
    assert episode.untruncated_tokens == episode.tokens
    assert episode.prefix_tokens + episode.branch_tokens == episode.tokens


def test_zooms_are_limited_by_rounds_and_images() -> None:
    assert typical_episode(zooms=9).frames == 128
    few_images = EpisodeConfig(max_images=70)
    assert episode_budget(few_images, SHAPE.vision, zooms=4, turn_tokens=1).zoom_frames == 6


def test_longest_episode_is_truncated_to_the_context() -> None:
    longest = longest_episode(PAPER, SHAPE.vision)
    assert longest.tokens == PAPER.max_context < longest.untruncated_tokens
    assert longest.sampled_tokens == 5 * 4096


def test_overview_that_fills_the_context_raises() -> None:
    with pytest.raises(ValueError, match=r"episode\.overview_frames"):
        longest_episode(EpisodeConfig(max_context=4096), SHAPE.vision)


@pytest.mark.parametrize(
    ("max_tokens", "expected"), [(10**9, [16]), (32_768, [4, 4, 4, 4]), (14_904, [1] * 16), (9, [1] * 16)]
)
def test_split_group_uses_the_fewest_sequences(max_tokens: int, expected: list[int]) -> None:
    branches = split_group(typical_episode(), 16, max_tokens)
    assert branches == expected
    episode = typical_episode()
    assert all(episode.prefix_tokens + n * episode.branch_tokens <= max_tokens for n in branches if n > 1)


def test_one_branch_equals_an_unpacked_sequence() -> None:
    assert packed_forward(SHAPE, typical_episode(), 1) == unpacked_forward(SHAPE, typical_episode())


def test_forward_flops_of_one_trajectory() -> None:
    episode = typical_episode()
    forward = unpacked_forward(SHAPE, episode)
    total = text_flops(SHAPE, episode.tokens, causal_pairs(episode.tokens))
    assert forward.text + forward.attention == total
    assert forward.head == head_flops(SHAPE, episode.sampled_tokens)
    # A weight takes two FLOPs per token; attention adds at most a quarter at this length.
    matrices = 2 * episode.tokens * SHAPE.text.matrix_weights
    assert matrices == forward.text < total < 1.25 * matrices


def test_pass_counts_include_recomputation() -> None:
    forward = unpacked_forward(SHAPE, typical_episode())
    text, vision, head = forward.text + forward.attention, forward.vision, forward.head
    plain = PassCounts(updates=1, forward_only=0, checkpointing=False)
    assert plain.model_flops(forward) == 3 * (text + vision + head)
    # The backward pass recomputes chunked logits.
    assert plain.executed_flops(forward) == 3 * (text + vision) + 4 * head
    full = PassCounts(updates=2, forward_only=2, checkpointing=True, vision_backward_factor=0)
    assert full.executed_flops(forward) == 2 * (4 * text + vision + 4 * head) + 2 * forward.total


def test_adapters_skip_weight_gradients_of_frozen_matrices() -> None:
    forward = unpacked_forward(SHAPE, typical_episode())
    passes = PassCounts(
        updates=1,
        forward_only=0,
        checkpointing=False,
        text_backward_factor=FROZEN_BACKWARD_FACTOR,
        vision_backward_factor=0,
    )
    matrices, attention = forward.text + forward.head, forward.attention
    assert passes.model_flops(forward) == 2 * matrices + 3 * attention + forward.vision


def test_shared_prefixes_save_tokens() -> None:
    passes, rate = PassCounts(1, 2, True), ComputeRate(num_gpus=8, peak_flops=989e12, mfu=0.35)
    episode = typical_episode()
    unpacked = unpacked_work(SHAPE, episode, 128 * 16, passes, rate)
    one_sequence = packed_work(SHAPE, episode, 128, 16, 10**9, passes, rate)
    split_groups = packed_work(SHAPE, episode, 128, 16, 32_768, passes, rate)
    assert unpacked.tokens - one_sequence.tokens == 128 * 15 * episode.prefix_tokens
    assert one_sequence.executed_flops < split_groups.executed_flops < unpacked.executed_flops
    one_branch_each = packed_work(SHAPE, episode, 128, 16, episode.tokens, passes, rate)
    assert one_branch_each == unpacked
    assert unpacked.seconds == pytest.approx(unpacked.executed_flops / (8 * 989e12 * 0.35))
