"""Lessons of the base model: answers match the frames and never mention a zoom."""

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
from vz_ray.video.image_grid import ImageGrid


@pytest.mark.parametrize("max_frames", [2, 6, 16, 64, 128])
@pytest.mark.parametrize("make_lesson", [make_album_lesson, make_needle_lesson])
def test_answers_match_frames(make_lesson, max_frames):
    rng = random.Random(max_frames)
    for _ in range(40):
        lesson = make_lesson(rng, max_frames)
        assert 1 <= len(lesson.frame_times_s) <= max_frames
        assert list(lesson.frame_times_s) == sorted(lesson.frame_times_s)
        times = (*lesson.frame_times_s, *lesson.clip_times_s)
        symbols = {f.name for t in times for f in lesson.video.flashes if f.covers(t)} | {"nothing"}
        assert 1 <= len(lesson.questions) <= MAX_QUESTIONS
        for question, answer in (*lesson.questions, *lesson.clip_questions):
            assert "zoom" not in question + answer
            if "<think>" in answer:
                assert answer.split("<think>")[1].split("<")[0].split(", ")[1].split()[0] in symbols
            if question.startswith(("When", "From")):
                matches = re.findall(r"(?:; |>)([a-z ]+?)((?: @[\d.-]+)+)", answer)
                assert matches
                for name, labels in matches:
                    for label in re.findall(r"@([\d.]+)", labels):
                        assert name.removesuffix(" border") in visible_objects(lesson, label)
            if question.startswith("What is shown"):
                for label, objects in re.findall(r"@([\d.]+) ([a-z, ]+)", answer):
                    names = {name.removesuffix(" border") for name in objects.split(", ")}
                    assert names == (visible_objects(lesson, label) or {"nothing"})


def visible_objects(lesson, label: str) -> set[str]:
    video = lesson.video
    times = {*lesson.frame_times_s, *lesson.clip_times_s}
    [time_s] = [time for time in times if f"{time:.2f}" == label]
    return {span.name for span in (*video.nights, *video.borders, *video.flashes) if span.covers(time_s)}


def test_nothing_requires_border_without_flash():
    rng = random.Random(5)
    num_nothing = 0
    for _ in range(200):
        lesson = make_needle_lesson(rng, 16)
        times = (*lesson.frame_times_s, *lesson.clip_times_s)
        by_text = {question.text: question for question in lesson.video.questions}
        for text, answer in (*lesson.questions, *lesson.clip_questions):
            if ", nothing</think>" in answer:
                num_nothing += 1
                question = by_text[text]
                is_overview = (text, answer) in lesson.questions
                queried = lesson.frame_times_s if is_overview else lesson.clip_times_s
                visible = lesson.frame_times_s if is_overview else times
                assert any(start <= t < end for t in queried for start, end in question.border_spans)
                assert not any(start <= t < end for t in visible for start, end in question.evidence_spans)
    assert num_nothing > 50


def test_clip_is_shown_before_its_questions():
    tokenizer = build_tokenizer(make_tokenizer_corpus(), 1792)
    chat_format = ChatFormat(tokenizer, PromptTemplate.load("conf/prompt/tiny-answer.yaml"), grid=ImageGrid(14, 2))
    rng = random.Random(0)
    lessons = iter(lambda: make_needle_lesson(rng, 16), None)
    lesson = next(candidate for candidate in lessons if candidate.clip_times_s)
    trajectory, pixels = lesson_to_trajectory(lesson, chat_format, 0)
    observation = trajectory.turns[len(lesson.questions) - 1].observation
    assert [ref.pts_s for ref in observation.frame_refs] == list(lesson.clip_times_s)
    assert {ref.digest for ref in trajectory.frame_refs} == set(pixels)


def test_span_ends_at_next_frame_or_video_end():
    rng = random.Random(0)
    num_spans = 0
    for _ in range(60):
        lesson = make_album_lesson(rng, 8)
        labels = [*(f"{time:.2f}" for time in lesson.frame_times_s), f"{lesson.video.duration_s:.2f}"]
        for question, answer in lesson.questions:
            if question.startswith("From"):
                for start, end in re.findall(r"@([\d.]+)-([\d.]+)", answer):
                    num_spans += 1
                    assert labels.index(end) == labels.index(start) + 1
    assert num_spans > 50


def test_loss_mask_covers_all_answers():
    tokenizer = build_tokenizer(make_tokenizer_corpus(), 1792)
    chat_format = ChatFormat(tokenizer, PromptTemplate.load("conf/prompt/tiny-answer.yaml"), grid=ImageGrid(14, 2))
    lesson = make_album_lesson(random.Random(3), 16)
    trajectory, pixels = lesson_to_trajectory(lesson, chat_format, 0)
    trained_ids = [i for i, on in zip(trajectory.expanded_ids, trajectory.loss_mask, strict=True) if on]
    answers = "".join(f"{answer}<|im_end|>" for _, answer in lesson.questions)
    assert tokenizer.decode(trained_ids) == answers
    assert {ref.digest for ref in trajectory.frame_refs} == set(pixels)


def test_lessons_grow_and_learning_rate_decays():
    training = BaseTrainingConfig(steps=1000)
    kinds = [training.lesson_kind(step) for step in range(1000)]
    assert kinds[0][0] == "naming"
    assert {("album", 2), ("album", 8), ("album", 16), ("needle", 32), ("needle", 128)} <= set(kinds)
    assert max(max_frames for _, max_frames in kinds) == 128
    assert all(max_frames <= 4 for _, max_frames in kinds[:250])
    assert training.lr_factor(0) < training.lr_factor(400) == 1
    assert training.lr_factor(999) < 0.05


def test_lessons_are_deterministic():
    training = BaseTrainingConfig()
    assert training.make_lessons(700) == training.make_lessons(700) != training.make_lessons(701)


def test_naming_lesson_names_each_frame():
    rng = random.Random(1)
    for _ in range(50):
        lesson = make_naming_lesson(rng)
        [(_, answer)] = lesson.questions
        assert len(answer.split("; ")) == len(lesson.frame_times_s) <= MAX_NAMING_FRAMES


def test_batch_order_resumes_at_step():
    batches = batch_indices(10, 4, seed=1)
    first = [next(batches) for _ in range(5)]
    assert [next(batch_indices(10, 4, seed=1, start=3)), next(batches)] == [
        first[3],
        next(batch_indices(10, 4, 1, 5)),
    ]
    assert sorted(i for batch in first for i in batch) == sorted([*range(10)] * 2)
