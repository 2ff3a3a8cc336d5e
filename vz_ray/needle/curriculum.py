"""Curriculum of the tiny base model: questions about rendered frames, without zooms.

- *naming*: what each of a few unrelated frames shows;
- *album*: when each object is shown, and what is shown at each time. Consecutive frames contain far more
  objects than a needle video, which trains retrieval;
- *needle*: the questions of the needle world, and when borders and nights are shown, on an overview, on a
  clip, or on a clip after an overview.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from blake3 import blake3

from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, ExternalAction, Trajectory, Turn
from vz_ray.needle.frame_renderer import render_frames
from vz_ray.needle.needle_video import (
    BORDERS,
    LETTERS,
    NUM_SHOTS,
    SLOTS_PER_SHOT,
    SYMBOLS,
    NeedleVideo,
    QuestionKind,
    VisibleSpan,
    format_question,
    make_video,
)
from vz_ray.needle.oracle import NOTHING_SEEN, format_answer_turn
from vz_ray.needle.synthesis import choose_question_kinds
from vz_ray.video.frame import RGB, Frame, FrameRef

SHOT_LENGTHS_S = (4, 8, 16, 32)
FPS = 8
MAX_NAMING_FRAMES = 3

MAX_QUESTIONS = 6

MAX_CONTENT_QUESTION_FRAMES = 4
"""Maximum frames of an album with questions about the content at a time, which are the hardest."""

Times = list[float]
QuestionAnswer = tuple[str, str]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lesson:
    """Questions about frames of a video, and their answers.

    Attributes:
        video: Timeline of the video.
        frame_times_s: Times of the first frames.
        questions: Questions about the first frames with answers; at least one.
        clip_times_s: Times of additional frames after those questions.
        clip_questions: Questions about the additional frames, with answers.
    """

    video: NeedleVideo
    frame_times_s: Sequence[float]
    questions: tuple[QuestionAnswer, ...]
    clip_times_s: Sequence[float] = ()
    clip_questions: tuple[QuestionAnswer, ...] = ()


def make_naming_lesson(rng: random.Random) -> Lesson:
    """Make a lesson that names a few unrelated frames, mostly flashes."""
    video = _needle_video(rng)
    spans = (*video.flashes, *video.flashes, *video.borders, *video.nights)
    times: set[float] = set()
    for _ in range(rng.randint(1, MAX_NAMING_FRAMES)):
        span = rng.choice(spans) if rng.random() < 0.85 else VisibleSpan(0.0, video.duration_s, "")
        times.add(int((span.start_s + rng.random() * (span.end_s - span.start_s)) * FPS) / FPS)
    answer = "; ".join(_describe(video, time) for time in sorted(times))
    return Lesson(video, sorted(times), (("What does each frame show?", f"<answer>{answer}</answer>"),))


def make_album_lesson(rng: random.Random, max_frames: int) -> Lesson:
    """Make a lesson on at most `max_frames` consecutive frames: when each object is shown, and vice versa."""
    while True:
        video, times, step_s = _album(rng, max_frames)
        questions = [*_time_questions(rng, video, times, step_s), *_flash_questions(rng, video)]
        if max_frames <= MAX_CONTENT_QUESTION_FRAMES:
            questions += _content_questions(rng, video, times)
        if questions:
            return Lesson(video, times, _sample_questions(rng, questions, MAX_QUESTIONS))


def make_needle_lesson(rng: random.Random, max_frames: int) -> Lesson:
    """Make a lesson on at most `max_frames` frames of a needle video: its questions and their subtasks."""
    while True:
        video = _needle_video(rng)
        times = _view_times(rng, video, max_frames)
        questions = _sample_questions(
            rng, [*_border_time_questions(video, times), *_needle_questions(rng, video, times)], MAX_QUESTIONS
        )
        if not questions:
            continue
        if len(times) == NUM_SHOTS and rng.random() < 0.7:
            clip = _clip_times(rng, video)
            clip_questions = _sample_questions(
                rng,
                [
                    *_border_time_questions(video, clip, before=times),
                    *_needle_questions(rng, video, clip, before=times),
                ],
                3,
            )
            if clip_questions:
                return Lesson(video, times, questions[:2], clip, clip_questions)
        return Lesson(video, times, questions)


def _sample_questions(
    rng: random.Random, questions: list[QuestionAnswer], max_questions: int
) -> tuple[QuestionAnswer, ...]:
    return tuple(rng.sample(questions, min(max_questions, len(questions))))


# -- frames -----------------------------------------------------------------


def _needle_video(rng: random.Random) -> NeedleVideo:
    """Make a needle video of a random length."""
    shot_s = rng.choice(SHOT_LENGTHS_S)
    return make_video(rng.randrange(2**31), shot_s * NUM_SHOTS, choose_question_kinds(shot_s, FPS, 4, rng))


def _album(rng: random.Random, max_frames: int) -> tuple[NeedleVideo, Times, float]:
    """Make a video with objects in many frames; return it, the frame times, and the seconds between them."""
    shot_s = rng.choice(SHOT_LENGTHS_S)
    start_s, step_s, count = 0.0, float(shot_s), min(max_frames, NUM_SHOTS)
    zoom_level = rng.random()
    if zoom_level < 0.4:
        start_s, step_s, count = (
            rng.randrange(NUM_SHOTS) * step_s,
            step_s / SLOTS_PER_SHOT,
            min(max_frames, SLOTS_PER_SHOT),
        )
        if zoom_level < 0.15 and step_s / SLOTS_PER_SHOT * FPS >= 1:
            start_s, step_s = start_s + rng.randrange(SLOTS_PER_SHOT) * step_s, step_s / SLOTS_PER_SHOT
    else:
        start_s = rng.randrange(NUM_SHOTS - count + 1) * step_s
    times = [start_s + step_s * k for k in range(count)]

    def sample_spans(names: Sequence[str]) -> tuple[VisibleSpan, ...]:
        unique = rng.sample(names, rng.randint(1, min(len(names), count)))
        repeated = rng.choices(unique, k=rng.randint(0, min(len(unique), count - len(unique))))
        starts = rng.sample(times, len(unique) + len(repeated))
        names = [*unique, *repeated]
        return tuple(VisibleSpan(start, start + step_s, name) for start, name in zip(starts, names, strict=True))

    nights = sample_spans(("night",)) if rng.random() < 0.5 else ()
    video = NeedleVideo(
        rng.randrange(2**31),
        shot_s * NUM_SHOTS,
        sample_spans(BORDERS),
        sample_spans(SYMBOLS),
        nights,
        questions=(),
    )
    return video, times, step_s


def _view_times(rng: random.Random, video: NeedleVideo, max_frames: int) -> Times:
    """Return the times of an overview or of a clip, at most `max_frames` frames."""
    if rng.random() < 0.5 and max_frames >= NUM_SHOTS:
        counts = [n for n in (NUM_SHOTS, 32, 64, 128) if n <= max_frames]
        return _steps(0.0, video.duration_s, rng.choice(counts))
    times = _clip_times(rng, video)
    first = rng.randrange(max(1, len(times) - max_frames + 1))
    return times[first : first + max_frames]


def _clip_times(rng: random.Random, video: NeedleVideo) -> Times:
    """Return the frame times of a zoom into a relevant segment, one per slot."""
    question = rng.choice(video.questions)
    return _steps(*rng.choice((*question.border_spans, *question.zoom_path)), SLOTS_PER_SHOT)


def _steps(start_s: float, end_s: float, count: int) -> Times:
    return [start_s + (end_s - start_s) * k / count for k in range(count)]


# -- questions --------------------------------------------------------------


def _time_questions(rng: random.Random, video: NeedleVideo, times: Times, step_s: float) -> Iterator[QuestionAnswer]:
    """Yield questions for the times of each object of an album; half of the lessons also ask for the end."""
    spans = sorted((*video.borders, *video.flashes, *video.nights), key=lambda span: span.start_s)
    ends = rng.random() < 0.5
    if ends and times[-1] + step_s < video.duration_s:
        # The end of these spans has no frame.
        last = {_object_name(span) for span in spans if span.start_s == times[-1]}
        spans = [span for span in spans if _object_name(span) not in last]
    times_of: dict[str, str] = {}
    for span in spans:
        label = f" @{span.start_s:.2f}" + (f"-{span.end_s:.2f}" if ends else "")
        times_of[_object_name(span)] = times_of.get(_object_name(span), "") + label
    for part in _partition(rng, list(times_of), (1, 2, 3, 5, 8)):
        question = "From when to when is shown" if ends else "When is shown"
        answer = "; ".join(name + times_of[name] for name in part)
        yield f"{question}: {', '.join(part)}?", f"<answer>{answer}</answer>"


def _flash_questions(rng: random.Random, video: NeedleVideo) -> Iterator[QuestionAnswer]:
    """Yield questions for the symbol in a border with one flash, and sometimes with none."""
    for border in {span.name: None for span in video.borders}:
        starts = {span.start_s for span in video.borders if span.name == border}
        flashes = [span.name for span in video.flashes if span.start_s in starts]
        if len(flashes) == 1:
            letter = LETTERS[SYMBOLS.index(flashes[0])]
            yield (
                format_question(QuestionKind.IDENTIFY, border),
                format_answer_turn(border, flashes[0], letter),
            )
        elif not flashes and rng.random() < 0.5:
            yield (
                format_question(QuestionKind.IDENTIFY, border),
                format_answer_turn(border, NOTHING_SEEN, NOTHING_SEEN),
            )


def _content_questions(rng: random.Random, video: NeedleVideo, times: Times) -> Iterator[QuestionAnswer]:
    """Yield questions for the content of an album at given times."""
    for part in _partition(rng, times, (1, 2, 4, 6)):
        labels = ", ".join(f"@{time:.2f}" for time in part)
        answer = "; ".join(f"@{time:.2f} {_describe(video, time)}" for time in part)
        yield f"What is shown {labels}?", f"<answer>{answer}</answer>"


def _partition(rng: random.Random, items: Sequence[T], sizes: Sequence[int]) -> Iterator[list[T]]:
    """Yield all items in random order, in parts of random sizes."""
    remaining = rng.sample(items, len(items))
    while remaining:
        size = rng.choice(sizes)
        yield remaining[:size]
        remaining = remaining[size:]


def _border_time_questions(video: NeedleVideo, times: Times, before: Sequence[float] = ()) -> Iterator[QuestionAnswer]:
    """Yield questions for the times of borders and nights with one or two frames, none in `before`."""
    for name in (*(f"{border} border" for border in BORDERS), "night"):
        spans = [span for span in (*video.borders, *video.nights) if _object_name(span) == name]
        hits = [time for time in times if any(span.covers(time) for span in spans)]
        if 0 < len(hits) <= 2 and not any(span.covers(time) for span in spans for time in before):
            labels = "".join(f" @{time:.2f}" for time in hits)
            yield f"When is shown: {name}?", f"<answer>{name}{labels}</answer>"


def _needle_questions(
    rng: random.Random, video: NeedleVideo, times: Times, before: Sequence[float] = ()
) -> Iterator[QuestionAnswer]:
    """Yield questions with visible evidence, and sometimes those with only a visible border."""
    for question in video.questions:
        hits_per_span = [[t for t in times if start <= t < end] for start, end in question.evidence_spans]
        if all(hits_per_span):
            listed_times = [hits[0] for hits in hits_per_span] if question.kind is QuestionKind.COUNT else []
            yield (
                question.text,
                format_answer_turn(question.border, question.symbol, question.answer, listed_times),
            )
            continue
        flash_missed = not any(start <= t < end for t in (*before, *times) for start, end in question.evidence_spans)
        border_visible = any(start <= t < end for t in times for start, end in question.border_spans)
        if flash_missed and border_visible and rng.random() < 0.5:
            answer = "0" if question.kind is QuestionKind.COUNT else NOTHING_SEEN
            yield question.text, format_answer_turn(question.border, NOTHING_SEEN, answer)


def _object_name(span: VisibleSpan) -> str:
    return f"{span.name} border" if span.name in BORDERS else span.name


def _describe(video: NeedleVideo, time_s: float) -> str:
    spans = (*video.nights, *video.borders, *video.flashes)
    return ", ".join(_object_name(span) for span in spans if span.covers(time_s)) or NOTHING_SEEN


# -- trajectories -------------------------------------------------------------


def lesson_to_trajectory(lesson: Lesson, chat_format: ChatFormat, number: int) -> tuple[Trajectory, dict[str, RGB]]:
    """Convert a lesson to a trajectory; also return the pixels of its frames by digest. A frame is one visual token."""
    side = chat_format.grid.side
    frames = _render(lesson.video, lesson.frame_times_s, side)
    clip = _render(lesson.video, lesson.clip_times_s, side)
    observations = [
        chat_format.encode_observation(question, (), end_sampled=True) for question, _ in lesson.questions[1:]
    ]
    if lesson.clip_questions:
        observations.append(
            chat_format.encode_observation(
                chat_format.format_question(lesson.clip_questions[0][0], clip), clip, end_sampled=True
            )
        )
    observations += [
        chat_format.encode_observation(question, (), end_sampled=True) for question, _ in lesson.clip_questions[1:]
    ]
    turns = tuple(
        Turn(ExternalAction(answer, chat_format.encode_assistant(answer)), answer, None, observation)
        for (_, answer), observation in zip(
            (*lesson.questions, *lesson.clip_questions), [*observations, None], strict=True
        )
    )
    trajectory = Trajectory(
        id=EpisodeId(0, f"lesson-{number}", 0),
        chat_format=chat_format.name,
        prompt=chat_format.encode_prompt(lesson.questions[0][0], frames),
        turns=turns,
        status=EpisodeStatus.ANSWERED,
    )
    return trajectory, {frame.ref.digest: frame.rgb for frame in (*frames, *clip)}


def _render(video: NeedleVideo, times_s: Sequence[float], side: int) -> tuple[Frame, ...]:
    images = render_frames(video, times_s, side)
    return tuple(
        Frame(
            FrameRef(
                video_id=f"needle:{video.seed}",
                uri="",
                stream=0,
                pts_s=time,
                width=side,
                height=side,
                scaler="drawn",
                decoder="drawn",
                digest=blake3(image.tobytes()).hexdigest(),
            ),
            image,
        )
        for time, image in zip(times_s, images, strict=True)
    )
