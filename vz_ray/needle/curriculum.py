"""What the tiny model's base is taught: to name what frames show and to answer about them.

A lesson is a few questions about the same frames, drawn directly; none has a zoom:

- *naming*: what each of a few unrelated frames shows;
- *album*: when each of many things is shown, and what is shown at which time, on frames
  in a row that show far more than a needle video does: most of finding is learned here;
- *world*: the needle world's own questions, and when its borders and nights are shown, on
  an overview, on a clip, or on a clip that is shown after an overview.
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
FRAME_SIDE = 28
"""Frames are drawn at the model's size: one visual token each."""

MAX_NAMING_FRAMES = 3
"""Most frames of a naming lesson."""

MAX_QUESTIONS = 6
"""Most questions of a lesson."""

MAX_CONTENT_QUESTION_FRAMES = 4
"""Most frames of an album that asks what is shown at each time, which is harder than the reverse."""

Times = list[float]
QuestionAnswer = tuple[str, str]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lesson:
    """Questions about frames of a video, and what to say to each.

    Attributes:
        video: What the frames show.
        frame_times_s: Times of the frames that are shown first.
        questions: Questions about them, at least one, and their answers.
        clip_times_s: Times of further frames, shown after those questions.
        clip_questions: Questions about these, and their answers.
    """

    video: NeedleVideo
    frame_times_s: Sequence[float]
    questions: tuple[QuestionAnswer, ...]
    clip_times_s: Sequence[float] = ()
    clip_questions: tuple[QuestionAnswer, ...] = ()


def make_naming_lesson(rng: random.Random) -> Lesson:
    """Names what a few unrelated moments show, most of them in flashes, which are rare: the first lesson."""
    video = _needle_video(rng)
    shown = (*video.flashes, *video.flashes, *video.borders, *video.nights)
    times: set[float] = set()
    for _ in range(rng.randint(1, MAX_NAMING_FRAMES)):
        span = rng.choice(shown) if rng.random() < 0.85 else VisibleSpan(0.0, video.duration_s, "")
        times.add(int((span.start_s + rng.random() * (span.end_s - span.start_s)) * FPS) / FPS)
    said = "; ".join(_seen(video, time) for time in sorted(times))
    return Lesson(video, sorted(times), (("What does each frame show?", f"<answer>{said}</answer>"),))


def make_album_lesson(rng: random.Random, max_frames: int) -> Lesson:
    """Asks for everything on at most `max_frames` frames in a row: when it is shown, and what is shown when."""
    while True:
        video, times, step_s = _album(rng, max_frames)
        exchanges = [*_finds(rng, video, times, step_s), *_flashes(rng, video)]
        if max_frames <= MAX_CONTENT_QUESTION_FRAMES:
            exchanges += _shows(rng, video, times)
        if exchanges:
            return Lesson(video, times, _some(rng, exchanges, MAX_QUESTIONS))


def make_needle_lesson(rng: random.Random, max_frames: int) -> Lesson:
    """Asks what is asked of needle videos, and what must be found first, on at most `max_frames` frames."""
    while True:
        video = _needle_video(rng)
        times = _view(rng, video, max_frames)
        exchanges = _some(rng, [*_when(video, times), *_what(rng, video, times)], MAX_QUESTIONS)
        if not exchanges:
            continue
        if len(times) == NUM_SHOTS and rng.random() < 0.7:
            clip = _clip(rng, video)
            about = _some(rng, [*_when(video, clip, before=times), *_what(rng, video, clip, before=times)], 3)
            if about:
                return Lesson(video, times, exchanges[:2], clip, about)
        return Lesson(video, times, exchanges)


def _some(rng: random.Random, exchanges: list[QuestionAnswer], most: int) -> tuple[QuestionAnswer, ...]:
    return tuple(rng.sample(exchanges, min(most, len(exchanges))))


# -- frames -----------------------------------------------------------------


def _needle_video(rng: random.Random) -> NeedleVideo:
    """A video of any of the world's lengths."""
    shot_s = rng.choice(SHOT_LENGTHS_S)
    return make_video(rng.randrange(2**31), shot_s * NUM_SHOTS, choose_question_kinds(shot_s, FPS, 4, rng))


def _album(rng: random.Random, most: int) -> tuple[NeedleVideo, Times, float]:
    """A video with something in most of its frames, their times, and the seconds between them."""
    shot_s = rng.choice(SHOT_LENGTHS_S)
    start_s, step_s, count = 0.0, float(shot_s), min(most, NUM_SHOTS)
    way = rng.random()
    if way < 0.4:
        start_s, step_s, count = (
            rng.randrange(NUM_SHOTS) * step_s,
            step_s / SLOTS_PER_SHOT,
            min(most, SLOTS_PER_SHOT),
        )
        if way < 0.15 and step_s / SLOTS_PER_SHOT * FPS >= 1:
            start_s, step_s = start_s + rng.randrange(SLOTS_PER_SHOT) * step_s, step_s / SLOTS_PER_SHOT
    else:
        start_s = rng.randrange(NUM_SHOTS - count + 1) * step_s
    times = [start_s + step_s * k for k in range(count)]

    def some(names: Sequence[str]) -> tuple[VisibleSpan, ...]:
        once = rng.sample(names, rng.randint(1, min(len(names), count)))
        again = rng.choices(once, k=rng.randint(0, min(len(once), count - len(once))))
        starts = rng.sample(times, len(once) + len(again))
        return tuple(
            VisibleSpan(at, at + step_s, name) for at, name in zip(starts, [*once, *again], strict=True)
        )

    nights = some(("night",)) if rng.random() < 0.5 else ()
    video = NeedleVideo(
        rng.randrange(2**31), shot_s * NUM_SHOTS, some(BORDERS), some(SYMBOLS), nights, questions=()
    )
    return video, times, step_s


def _view(rng: random.Random, video: NeedleVideo, most: int) -> Times:
    """An overview of at most `most` frames, or what a zoom into a part of the video shows."""
    if rng.random() < 0.5 and most >= NUM_SHOTS:
        return _steps(0.0, video.duration_s, rng.choice([n for n in (NUM_SHOTS, 32, 64, 128) if n <= most]))
    times = _clip(rng, video)
    first = rng.randrange(max(1, len(times) - most + 1))
    return times[first : first + most]


def _clip(rng: random.Random, video: NeedleVideo) -> Times:
    """What a zoom that shows every slot once would show, into a part of the video worth it."""
    question = rng.choice(video.questions)
    return _steps(*rng.choice((*question.border_spans, *question.zoom_path)), SLOTS_PER_SHOT)


def _steps(start_s: float, end_s: float, count: int) -> Times:
    return [start_s + (end_s - start_s) * k / count for k in range(count)]


# -- questions --------------------------------------------------------------


def _finds(rng: random.Random, video: NeedleVideo, times: Times, step_s: float) -> Iterator[QuestionAnswer]:
    """Each time that each thing of an album is shown; every second lesson asks until when, too."""
    spans = sorted((*video.borders, *video.flashes, *video.nights), key=lambda span: span.start_s)
    ends = rng.random() < 0.5
    if ends and times[-1] + step_s < video.duration_s:
        # No frame shows that time.
        last = {_called(span) for span in spans if span.start_s == times[-1]}
        spans = [span for span in spans if _called(span) not in last]
    at: dict[str, str] = {}
    for span in spans:
        said = f" @{span.start_s:.2f}" + (f"-{span.end_s:.2f}" if ends else "")
        at[_called(span)] = at.get(_called(span), "") + said
    for part in _parts(rng, list(at), (1, 2, 3, 5, 8)):
        question = "From when to when is shown" if ends else "When is shown"
        found = "; ".join(name + at[name] for name in part)
        yield f"{question}: {', '.join(part)}?", f"<answer>{found}</answer>"


def _flashes(rng: random.Random, video: NeedleVideo) -> Iterator[QuestionAnswer]:
    """What flashes in a border, where it is one thing or, now and then, nothing."""
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


def _shows(rng: random.Random, video: NeedleVideo, times: Times) -> Iterator[QuestionAnswer]:
    """What an album shows at each time."""
    for part in _parts(rng, times, (1, 2, 4, 6)):
        asked = ", ".join(f"@{time:.2f}" for time in part)
        said = "; ".join(f"@{time:.2f} {_seen(video, time)}" for time in part)
        yield f"What is shown {asked}?", f"<answer>{said}</answer>"


def _parts(rng: random.Random, items: Sequence[T], sizes: Sequence[int]) -> Iterator[list[T]]:
    """All of `items` in random order, in parts of random sizes."""
    left = rng.sample(items, len(items))
    while left:
        size = rng.choice(sizes)
        yield left[:size]
        left = left[size:]


def _when(video: NeedleVideo, times: Times, before: Sequence[float] = ()) -> Iterator[QuestionAnswer]:
    """When a border or the night is shown, where that is at most twice, and not among what came before."""
    for name in (*(f"{border} border" for border in BORDERS), "night"):
        spans = [span for span in (*video.borders, *video.nights) if _called(span) == name]
        hits = [time for time in times if any(span.covers(time) for span in spans)]
        if 0 < len(hits) <= 2 and not any(span.covers(time) for span in spans for time in before):
            said = "".join(f" @{time:.2f}" for time in hits)
            yield f"When is shown: {name}?", f"<answer>{name}{said}</answer>"


def _what(
    rng: random.Random, video: NeedleVideo, times: Times, before: Sequence[float] = ()
) -> Iterator[QuestionAnswer]:
    """The video's own questions, where the frames show the answer or, now and then, only the border."""
    for question in video.questions:
        seen = [[t for t in times if start <= t < end] for start, end in question.events]
        if all(seen):
            counted = [hits[0] for hits in seen] if question.kind is QuestionKind.COUNT else []
            yield (
                question.text,
                format_answer_turn(question.border, question.symbol, question.answer, counted),
            )
            continue
        missed = not any(start <= t < end for t in (*before, *times) for start, end in question.events)
        shown = any(start <= t < end for t in times for start, end in question.border_spans)
        if missed and shown and rng.random() < 0.5:
            none = "0" if question.kind is QuestionKind.COUNT else NOTHING_SEEN
            yield question.text, format_answer_turn(question.border, NOTHING_SEEN, none)


def _called(span: VisibleSpan) -> str:
    return f"{span.name} border" if span.name in BORDERS else span.name


def _seen(video: NeedleVideo, time_s: float) -> str:
    spans = (*video.nights, *video.borders, *video.flashes)
    return ", ".join(_called(span) for span in spans if span.covers(time_s)) or NOTHING_SEEN


# -- as a conversation ------------------------------------------------------


def lesson_to_trajectory(lesson: Lesson, wire: ChatFormat, number: int) -> tuple[Trajectory, dict[str, RGB]]:
    """The lesson as written turns, and the pixels of its frames by digest."""
    frames, clip = _frames(lesson.video, lesson.frame_times_s), _frames(lesson.video, lesson.clip_times_s)
    followed = [
        wire.encode_observation(question, (), end_sampled=True) for question, _ in lesson.questions[1:]
    ]
    if lesson.clip_questions:
        followed.append(
            wire.encode_observation(
                wire.format_question(lesson.clip_questions[0][0], clip), clip, end_sampled=True
            )
        )
    followed += [
        wire.encode_observation(question, (), end_sampled=True) for question, _ in lesson.clip_questions[1:]
    ]
    turns = tuple(
        Turn(ExternalAction(answer, wire.encode_assistant(answer)), answer, None, reply)
        for (_, answer), reply in zip(
            (*lesson.questions, *lesson.clip_questions), [*followed, None], strict=True
        )
    )
    played = Trajectory(
        id=EpisodeId(0, f"lesson-{number}", 0),
        chat_format=wire.name,
        prompt=wire.encode_prompt(lesson.questions[0][0], frames),
        turns=turns,
        status=EpisodeStatus.ANSWERED,
    )
    return played, {frame.ref.digest: frame.rgb for frame in (*frames, *clip)}


def _frames(video: NeedleVideo, times_s: Sequence[float]) -> tuple[Frame, ...]:
    pictures = render_frames(video, times_s, FRAME_SIDE)
    return tuple(
        Frame(
            FrameRef(
                video_id=f"needle:{video.seed}",
                uri="",
                stream=0,
                pts_s=time,
                width=FRAME_SIDE,
                height=FRAME_SIDE,
                scaler="drawn",
                decoder="drawn",
                digest=blake3(picture.tobytes()).hexdigest(),
            ),
            picture,
        )
        for time, picture in zip(times_s, pictures, strict=True)
    )
