"""Lessons say what their frames show, and never mention a zoom."""

from __future__ import annotations

import random

import pytest

from vz_ray.coldstart.base import BaseTraining, corpus
from vz_ray.coldstart.lessons import make_lesson, trajectory
from vz_ray.coldstart.sft import batches_of
from vz_ray.coldstart.tiny import build_tokenizer
from vz_ray.episode.wire import WireFormat, Wording


@pytest.mark.parametrize("most", [3, 6, 16, 64, 128])
def test_what_is_said_is_shown(most):
    rng = random.Random(most)
    for _ in range(40):
        lesson = make_lesson(rng, most)
        assert 1 <= len(lesson.times_s) <= max(most, 16)
        assert list(lesson.times_s) == sorted(lesson.times_s)
        shown = {f.name for t in lesson.times_s for f in lesson.video.flashes if f.covers(t)}
        for question, answer in lesson.exchanges:
            assert "zoom" not in question + answer
            if "<think>" in answer:
                assert answer.split("<think>")[1].split("<")[0].split(", ")[1].split()[0] in shown


def test_a_lesson_is_a_conversation_with_every_answer_learned():
    tokenizer = build_tokenizer(corpus(), 1792)
    wire = WireFormat(tokenizer, Wording.load("conf/prompt/tiny-answer.yaml"))
    lesson = make_lesson(random.Random(3), 16)
    played, pixels = trajectory(lesson, wire, 0)
    learned = [i for i, on in zip(played.expanded_ids, played.loss_mask, strict=True) if on]
    said = "".join(f"{answer}<|im_end|>" for _, answer in lesson.exchanges)
    assert tokenizer.decode(learned) == said
    assert {ref.digest for ref in played.refs} == set(pixels)


def test_lessons_grow_longer_and_rates_end_low():
    training = BaseTraining(steps=1000)
    frames = [training.frames(step) for step in range(1000)]
    assert frames[0] == 0
    assert {4, 8, 16, 32, 64} <= set(frames)
    assert max(frames) == 128
    assert training.rate(0) < training.rate(400) == training.learning_rate
    assert training.rate(999) < 0.05 * training.learning_rate


def test_batches_go_on_where_they_were():
    whole = batches_of(10, 4, seed=1)
    first = [next(whole) for _ in range(5)]
    assert [next(batches_of(10, 4, seed=1, start=3)), next(whole)] == [
        first[3],
        next(batches_of(10, 4, 1, 5)),
    ]
    assert sorted(i for batch in first for i in batch) == sorted([*range(10)] * 2)
