"""Lessons say what their frames show, and never mention a zoom."""

from __future__ import annotations

import random
import re

import pytest

from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.learner.sft import batch_indices
from vz_ray.needle.base_training import BaseTrainingConfig, make_tokenizer_corpus
from vz_ray.needle.curriculum import (
    MAX_NAMING_FRAMES,
    MAX_QUESTIONS,
    lesson_to_trajectory,
    make_album_lesson,
    make_naming_lesson,
    make_needle_lesson,
)
from vz_ray.needle.tiny_model import build_tokenizer


@pytest.mark.parametrize("most", [2, 6, 16, 64, 128])
@pytest.mark.parametrize("make", [make_album_lesson, make_needle_lesson])
def test_what_is_said_is_shown(make, most):
    rng = random.Random(most)
    for _ in range(40):
        lesson = make(rng, most)
        assert 1 <= len(lesson.times_s) <= most
        assert list(lesson.times_s) == sorted(lesson.times_s)
        times = (*lesson.times_s, *lesson.clip_s)
        shown = {f.name for t in times for f in lesson.video.flashes if f.covers(t)} | {"nothing"}
        assert 1 <= len(lesson.exchanges) <= MAX_QUESTIONS
        for question, answer in (*lesson.exchanges, *lesson.about_clip):
            assert "zoom" not in question + answer
            if "<think>" in answer:
                assert answer.split("<think>")[1].split("<")[0].split(", ")[1].split()[0] in shown
            if question.startswith(("When", "From")):
                found = re.findall(r"(?:; |>)([a-z ]+?)((?: @[\d.-]+)+)", answer)
                assert found
                for name, said in found:
                    for time in re.findall(r"@([\d.]+)", said):
                        assert name.removesuffix(" border") in visible(lesson, time)
            if question.startswith("What is shown"):
                for time, said in re.findall(r"@([\d.]+) ([a-z, ]+)", answer):
                    named = {name.removesuffix(" border") for name in said.split(", ")}
                    assert named == (visible(lesson, time) or {"nothing"})


def visible(lesson, shown: str) -> set[str]:
    video = lesson.video
    times = {*lesson.times_s, *lesson.clip_s}
    [time_s] = [time for time in times if f"{time:.2f}" == shown]
    return {span.name for span in (*video.nights, *video.borders, *video.flashes) if span.covers(time_s)}


def test_nothing_is_said_only_where_a_border_is_shown_without_a_flash():
    rng = random.Random(5)
    said = 0
    for _ in range(200):
        lesson = make_needle_lesson(rng, 16)
        times = (*lesson.frame_times_s, *lesson.clip_times_s)
        asked = {question.text: question for question in lesson.video.questions}
        for text, answer in (*lesson.questions, *lesson.clip_questions):
            if ", nothing</think>" in answer:
                said += 1
                question = asked[text]
                first = (text, answer) in lesson.questions
                asked_of, seen = (lesson.frame_times_s,) * 2 if first else (lesson.clip_times_s, times)
                assert any(start <= t < end for t in asked_of for start, end in question.border_spans)
                assert not any(start <= t < end for t in seen for start, end in question.events)
    assert said > 50


def test_a_clip_is_asked_about_after_it_is_shown():
    tokenizer = build_tokenizer(make_tokenizer_corpus(), 1792)
    wire = ChatFormat(tokenizer, PromptTemplate.load("conf/prompt/tiny-answer.yaml"))
    rng = random.Random(0)
    lesson = next(found for found in iter(lambda: make_needle_lesson(rng, 16), None) if found.clip_times_s)
    played, pixels = lesson_to_trajectory(lesson, wire, 0)
    shown = played.turns[len(lesson.questions) - 1].observation
    assert [ref.pts_s for ref in shown.frame_refs] == list(lesson.clip_times_s)
    assert {ref.digest for ref in played.frame_refs} == set(pixels)


def test_an_end_is_the_time_of_the_next_frame_or_of_the_end_of_the_video():
    rng = random.Random(0)
    asked = 0
    for _ in range(60):
        lesson = make_album_lesson(rng, 8)
        known = [*(f"{time:.2f}" for time in lesson.frame_times_s), f"{lesson.video.duration_s:.2f}"]
        for question, answer in lesson.questions:
            if question.startswith("From"):
                for start, end in re.findall(r"@([\d.]+)-([\d.]+)", answer):
                    asked += 1
                    assert known.index(end) == known.index(start) + 1
    assert asked > 50


def test_a_lesson_is_a_conversation_with_every_answer_learned():
    tokenizer = build_tokenizer(make_tokenizer_corpus(), 1792)
    wire = ChatFormat(tokenizer, PromptTemplate.load("conf/prompt/tiny-answer.yaml"))
    lesson = make_album_lesson(random.Random(3), 16)
    played, pixels = lesson_to_trajectory(lesson, wire, 0)
    learned = [i for i, on in zip(played.expanded_ids, played.loss_mask, strict=True) if on]
    said = "".join(f"{answer}<|im_end|>" for _, answer in lesson.questions)
    assert tokenizer.decode(learned) == said
    assert {ref.digest for ref in played.frame_refs} == set(pixels)


def test_lessons_grow_longer_and_rates_end_low():
    training = BaseTrainingConfig(steps=1000)
    topics = [training.lesson_kind(step) for step in range(1000)]
    assert topics[0][0] == "naming"
    assert {("album", 2), ("album", 8), ("album", 16), ("world", 32), ("world", 128)} <= set(topics)
    assert max(most for _, most in topics) == 128
    assert [topic for topic in topics[:250] if topic[1] > 4] == []
    assert training.lr_factor(0) < training.lr_factor(400) == 1
    assert training.lr_factor(999) < 0.05


def test_lessons_of_a_step_are_the_same_each_time():
    training = BaseTrainingConfig()
    assert training.make_lessons(700) == training.make_lessons(700) != training.make_lessons(701)


def test_a_naming_lesson_names_a_few_moments():
    rng = random.Random(1)
    for _ in range(50):
        lesson = make_naming_lesson(rng)
        [(_, answer)] = lesson.questions
        assert len(answer.split("; ")) == len(lesson.frame_times_s) <= MAX_NAMING_FRAMES


def test_batches_go_on_where_they_were():
    whole = batch_indices(10, 4, seed=1)
    first = [next(whole) for _ in range(5)]
    assert [next(batch_indices(10, 4, seed=1, start=3)), next(whole)] == [
        first[3],
        next(batch_indices(10, 4, 1, 5)),
    ]
    assert sorted(i for batch in first for i in batch) == sorted([*range(10)] * 2)
