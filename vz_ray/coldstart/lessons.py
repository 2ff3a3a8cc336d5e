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

from vz_ray.coldstart.oracle import NOTHING, answer_text
from vz_ray.data.needle.draw import draw_frames
from vz_ray.data.needle.synth import kinds_for
from vz_ray.data.needle.world import (
    BORDERS,
    LETTERS,
    SHOTS,
    SLOTS,
    SYMBOLS,
    Kind,
    NeedleVideo,
    Span,
    ask,
    make_video,
)
from vz_ray.episode.trajectory import EpisodeId, Status, Trajectory, Turn, Written
from vz_ray.episode.wire import WireFormat
from vz_ray.video.frame import RGB, Frame, FrameRef

SHOT_S = (4, 8, 16, 32)
FPS = 8
SIDE = 28
"""Frames are drawn at the model's size: one visual token each."""

MOMENTS = 3
"""Most frames of a naming lesson."""

EXCHANGES = 6
"""Most questions of a lesson."""

MOST_SHOWN = 4
"""Most frames of an album that asks what is shown at each time, which is harder than the reverse."""

Times = list[float]
Exchange = tuple[str, str]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lesson:
    """Questions about frames of a video, and what to say to each.

    Attributes:
        video: What the frames show.
        times_s: Times of the frames that are shown first.
        exchanges: Questions about them, at least one, and their answers.
        clip_s: Times of further frames, shown after those questions.
        about_clip: Questions about these, and their answers.
    """

    video: NeedleVideo
    times_s: Sequence[float]
    exchanges: tuple[Exchange, ...]
    clip_s: Sequence[float] = ()
    about_clip: tuple[Exchange, ...] = ()


def naming_lesson(rng: random.Random) -> Lesson:
    """Names what a few unrelated moments show, most of them in flashes, which are rare: the first lesson."""
    video = _needle_video(rng)
    shown = (*video.flashes, *video.flashes, *video.borders, *video.nights)
    times: set[float] = set()
    for _ in range(rng.randint(1, MOMENTS)):
        span = rng.choice(shown) if rng.random() < 0.85 else Span(0.0, video.duration_s, "")
        times.add(int((span.start_s + rng.random() * (span.end_s - span.start_s)) * FPS) / FPS)
    said = "; ".join(_seen(video, time) for time in sorted(times))
    return Lesson(video, sorted(times), (("What does each frame show?", f"<answer>{said}</answer>"),))


def album_lesson(rng: random.Random, most: int) -> Lesson:
    """Asks for everything on at most `most` frames in a row: when it is shown, and what is shown when."""
    while True:
        video, times, step_s = _album(rng, most)
        exchanges = [*_finds(rng, video, times, step_s), *_flashes(rng, video)]
        if most <= MOST_SHOWN:
            exchanges += _shows(rng, video, times)
        if exchanges:
            return Lesson(video, times, _some(rng, exchanges, EXCHANGES))


def world_lesson(rng: random.Random, most: int) -> Lesson:
    """Asks what is asked of needle videos, and what must be found first, on at most `most` frames."""
    while True:
        video = _needle_video(rng)
        times = _view(rng, video, most)
        exchanges = _some(rng, [*_when(video, times), *_what(rng, video, times)], EXCHANGES)
        if not exchanges:
            continue
        if len(times) == SHOTS and rng.random() < 0.7:
            clip = _clip(rng, video)
            about = _some(rng, [*_when(video, clip, before=times), *_what(rng, video, clip, before=times)], 3)
            if about:
                return Lesson(video, times, exchanges[:2], clip, about)
        return Lesson(video, times, exchanges)


def _some(rng: random.Random, exchanges: list[Exchange], most: int) -> tuple[Exchange, ...]:
    return tuple(rng.sample(exchanges, min(most, len(exchanges))))


# -- frames -----------------------------------------------------------------


def _needle_video(rng: random.Random) -> NeedleVideo:
    """A video of any of the world's lengths."""
    shot_s = rng.choice(SHOT_S)
    return make_video(rng.randrange(2**31), shot_s * SHOTS, kinds_for(shot_s, FPS, 4, rng))


def _album(rng: random.Random, most: int) -> tuple[NeedleVideo, Times, float]:
    """A video with something in most of its frames, their times, and the seconds between them."""
    shot_s = rng.choice(SHOT_S)
    start_s, step_s, count = 0.0, float(shot_s), min(most, SHOTS)
    way = rng.random()
    if way < 0.4:
        start_s, step_s, count = rng.randrange(SHOTS) * step_s, step_s / SLOTS, min(most, SLOTS)
        if way < 0.15 and step_s / SLOTS * FPS >= 1:
            start_s, step_s = start_s + rng.randrange(SLOTS) * step_s, step_s / SLOTS
    else:
        start_s = rng.randrange(SHOTS - count + 1) * step_s
    times = [start_s + step_s * k for k in range(count)]

    def some(names: Sequence[str]) -> tuple[Span, ...]:
        once = rng.sample(names, rng.randint(1, min(len(names), count)))
        again = rng.choices(once, k=rng.randint(0, min(len(once), count - len(once))))
        starts = rng.sample(times, len(once) + len(again))
        return tuple(Span(at, at + step_s, name) for at, name in zip(starts, [*once, *again], strict=True))

    nights = some(("night",)) if rng.random() < 0.5 else ()
    video = NeedleVideo(
        rng.randrange(2**31), shot_s * SHOTS, some(BORDERS), some(SYMBOLS), nights, questions=()
    )
    return video, times, step_s


def _view(rng: random.Random, video: NeedleVideo, most: int) -> Times:
    """An overview of at most `most` frames, or what a zoom into a part of the video shows."""
    if rng.random() < 0.5 and most >= SHOTS:
        return _steps(0.0, video.duration_s, rng.choice([n for n in (SHOTS, 32, 64, 128) if n <= most]))
    times = _clip(rng, video)
    first = rng.randrange(max(1, len(times) - most + 1))
    return times[first : first + most]


def _clip(rng: random.Random, video: NeedleVideo) -> Times:
    """What a zoom that shows every slot once would show, into a part of the video worth it."""
    question = rng.choice(video.questions)
    return _steps(*rng.choice((*question.borders, *question.path)), SLOTS)


def _steps(start_s: float, end_s: float, count: int) -> Times:
    return [start_s + (end_s - start_s) * k / count for k in range(count)]


# -- questions --------------------------------------------------------------


def _finds(rng: random.Random, video: NeedleVideo, times: Times, step_s: float) -> Iterator[Exchange]:
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


def _flashes(rng: random.Random, video: NeedleVideo) -> Iterator[Exchange]:
    """What flashes in a border, where it is one thing or, now and then, nothing."""
    for border in {span.name: None for span in video.borders}:
        starts = {span.start_s for span in video.borders if span.name == border}
        flashes = [span.name for span in video.flashes if span.start_s in starts]
        if len(flashes) == 1:
            letter = LETTERS[SYMBOLS.index(flashes[0])]
            yield ask(Kind.IDENTIFY, border), answer_text(border, flashes[0], letter)
        elif not flashes and rng.random() < 0.5:
            yield ask(Kind.IDENTIFY, border), answer_text(border, NOTHING, NOTHING)


def _shows(rng: random.Random, video: NeedleVideo, times: Times) -> Iterator[Exchange]:
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


def _when(video: NeedleVideo, times: Times, before: Sequence[float] = ()) -> Iterator[Exchange]:
    """When a border or the night is shown, where that is at most twice, and not among what came before."""
    for name in (*(f"{border} border" for border in BORDERS), "night"):
        spans = [span for span in (*video.borders, *video.nights) if _called(span) == name]
        hits = [time for time in times if any(span.covers(time) for span in spans)]
        if 0 < len(hits) <= 2 and not any(span.covers(time) for span in spans for time in before):
            said = "".join(f" @{time:.2f}" for time in hits)
            yield f"When is shown: {name}?", f"<answer>{name}{said}</answer>"


def _what(
    rng: random.Random, video: NeedleVideo, times: Times, before: Sequence[float] = ()
) -> Iterator[Exchange]:
    """The video's own questions, where the frames show the answer or, now and then, only the border."""
    for question in video.questions:
        seen = [[t for t in times if start <= t < end] for start, end in question.events]
        if all(seen):
            counted = [hits[0] for hits in seen] if question.kind is Kind.COUNT else []
            yield question.text, answer_text(question.border, question.symbol, question.answer, counted)
            continue
        missed = not any(start <= t < end for t in (*before, *times) for start, end in question.events)
        shown = any(start <= t < end for t in times for start, end in question.borders)
        if missed and shown and rng.random() < 0.5:
            none = "0" if question.kind is Kind.COUNT else NOTHING
            yield question.text, answer_text(question.border, NOTHING, none)


def _called(span: Span) -> str:
    return f"{span.name} border" if span.name in BORDERS else span.name


def _seen(video: NeedleVideo, time_s: float) -> str:
    spans = (*video.nights, *video.borders, *video.flashes)
    return ", ".join(_called(span) for span in spans if span.covers(time_s)) or NOTHING


# -- as a conversation ------------------------------------------------------


def trajectory(lesson: Lesson, wire: WireFormat, number: int) -> tuple[Trajectory, dict[str, RGB]]:
    """The lesson as written turns, and the pixels of its frames by digest."""
    frames, clip = _frames(lesson.video, lesson.times_s), _frames(lesson.video, lesson.clip_s)
    followed = [wire.reply(question, (), ended=True) for question, _ in lesson.exchanges[1:]]
    if lesson.about_clip:
        followed.append(wire.reply(wire.question_text(lesson.about_clip[0][0], clip), clip, ended=True))
    followed += [wire.reply(question, (), ended=True) for question, _ in lesson.about_clip[1:]]
    turns = tuple(
        Turn(Written(answer, wire.written(answer)), answer, None, reply)
        for (_, answer), reply in zip((*lesson.exchanges, *lesson.about_clip), [*followed, None], strict=True)
    )
    played = Trajectory(
        id=EpisodeId(0, f"lesson-{number}", 0),
        wire=wire.name,
        prompt=wire.prompt(lesson.exchanges[0][0], frames),
        turns=turns,
        status=Status.ANSWERED,
    )
    return played, {frame.ref.digest: frame.rgb for frame in (*frames, *clip)}


def _frames(video: NeedleVideo, times_s: Sequence[float]) -> tuple[Frame, ...]:
    pictures = draw_frames(video, times_s, SIDE)
    return tuple(
        Frame(
            FrameRef(
                video_id=f"needle:{video.seed}",
                uri="",
                stream=0,
                pts_s=time,
                width=SIDE,
                height=SIDE,
                scaler="drawn",
                decoder="drawn",
                digest=blake3(picture.tobytes()).hexdigest(),
            ),
            picture,
        )
        for time, picture in zip(times_s, pictures, strict=True)
    )
