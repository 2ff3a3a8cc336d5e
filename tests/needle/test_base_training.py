"""What the base is meant to be: it reads frames and answers, and has never seen a zoom."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.env.trajectory import Trajectory
from vz_ray.learner.batch import collate, in_memory_pixels
from vz_ray.learner.example import encode_trajectory
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.learner.packing import PrefixTree, plan_micro_batches
from vz_ray.learner.policy_model import PolicyModel
from vz_ray.needle.curriculum import lesson_to_trajectory, make_album_lesson, make_needle_lesson

BASE = Path(__file__).parents[2] / "assets" / "tiny-base"


@pytest.fixture(scope="module")
def base():
    return (
        PolicyModel.from_pretrained(BASE),
        ImageSpec.from_pretrained(BASE),
        AutoTokenizer.from_pretrained(BASE),
    )


def known(base, make, most: int, count: int, begins: str) -> float:
    """Share of the answers to questions that begin so that greedy decoding would give, token for token."""
    policy, spec, tokenizer = base
    wire = ChatFormat(tokenizer, PromptTemplate.load("conf/prompt/tiny-answer.yaml"))
    rng, played, pixels, lessons = random.Random(f"test/{most}"), [], {}, []
    while len(lessons) < count:
        lesson = make(rng, most)
        if any(question.startswith(begins) for question, _ in (*lesson.exchanges, *lesson.about_clip)):
            one, frames = lesson_to_trajectory(lesson, wire, len(lessons))
            lessons.append((lesson, one))
            played.append(encode_trajectory(one, policy.tokens, spec.merge))
            pixels.update(frames)
    right: list[bool] = []
    for trees in plan_micro_batches(played, 8192, 1)[0]:
        batch = collate(trees, played, in_memory_pixels(pixels), policy.tokens, spec, torch.device("cpu"))
        with torch.no_grad():
            logprobs, _ = policy(batch)
        for row, index in zip(logprobs, batch.indices, strict=True):
            right += _known_turns(row, *lessons[index], begins)
    return sum(right) / len(right)


def _known_turns(row: torch.Tensor, lesson, one: Trajectory, begins: str) -> list[bool]:
    found, start = [], 0
    for (question, _), turn in zip((*lesson.exchanges, *lesson.about_clip), one.turns, strict=True):
        end = start + len(turn.action.token_ids)
        if question.startswith(begins):
            # A token with more than half of the mass is the one that greedy decoding takes.
            found.append(bool((row[start:end].exp() > 0.5).all()))
        start = end
    return found


@pytest.mark.parametrize("most", [8, 16, 32, 64, 128])
def test_it_answers_what_its_frames_show(base, most):
    assert known(base, make_needle_lesson, most, 40, "What flashes") >= 0.9


def test_it_counts_what_its_frames_show(base):
    assert known(base, make_needle_lesson, 8, 40, "How many") >= 0.8


def test_it_finds_what_overview_frames_show(base):
    assert known(base, make_needle_lesson, 16, 40, "When is") >= 0.9
    assert known(base, make_album_lesson, 16, 40, "What flashes") >= 0.9


@pytest.mark.parametrize("seed", range(8))
def test_it_has_never_seen_a_zoom(base, seed):
    """Told that it may zoom, it gives a zoom call less than one chance in a thousand anywhere in its turn."""
    policy, spec, tokenizer = base
    wire = ChatFormat(tokenizer, PromptTemplate.load("conf/prompt/tiny.yaml"))
    call = tokenizer.encode("<video_zoom>", add_special_tokens=False)
    assert len(call) == 1
    lesson = make_needle_lesson(random.Random(seed), 16)
    one, pixels = lesson_to_trajectory(lesson, wire, 0)
    example = encode_trajectory(one, policy.tokens, spec.merge)
    trees = [PrefixTree.from_members([0], [example])]
    batch = collate(trees, [example], in_memory_pixels(pixels), policy.tokens, spec, torch.device("cpu"))
    with torch.no_grad():
        hidden = policy.hidden_states(batch)[0, batch.hidden_index[0]]
        chance = torch.softmax(hidden @ policy.hf.lm_head.weight.T, dim=-1)[:, call[0]]
    assert chance.max() < 1e-3
