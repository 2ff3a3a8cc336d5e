"""What the tiny model's base is taught: to name what frames show and to answer about them.

A lesson is a few questions about the same frames, drawn directly; none has a zoom:

- *name*: what each frame shows, with its time;
- *when*: between which shown times a border or the night is visible;
- *what*: the needle world's own questions, where the frames show the answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blake3 import blake3

from vz_ray.coldstart.oracle import answer_text
from vz_ray.data.needle.draw import draw_frames
from vz_ray.data.needle.synth import kinds_for
from vz_ray.data.needle.world import BORDERS, SHOTS, SLOTS, Kind, NeedleVideo, Span, make_video
from vz_ray.episode.trajectory import EpisodeId, Status, Trajectory, Turn, Written
from vz_ray.episode.wire import WireFormat
from vz_ray.video.frame import RGB, Frame, FrameRef

SHOT_S = (4, 8, 16, 32)
FPS = 8
SIDE = 28
"""Frames are drawn at the model's size: one visual token each."""

MOMENTS = 3
"""Most frames of a naming lesson."""

MOST_NAMED = 4
"""Most frames that are named one by one."""

Times = list[float]


@dataclass(frozen=True, slots=True)
class Lesson:
    """Questions about frames of a video at `times_s`, and what to say to each."""

    video: NeedleVideo
    times_s: Sequence[float]
    exchanges: tuple[tuple[str, str], ...]


def random_video(rng: random.Random) -> NeedleVideo:
    """A video of any of the world's lengths."""
    shot_s = rng.choice(SHOT_S)
    return make_video(rng.randrange(2**31), shot_s * SHOTS, kinds_for(shot_s, FPS, 4, rng))


def make_lesson(rng: random.Random, most: int, *, apart: bool = True) -> Lesson:
    """A lesson on at most `most` frames, with one question at least and six at most.

    With `apart`, a part of the frames is those that show something, so that colours
    must be told apart; without, it is frames in a row, each named with its time, from
    which the copying of times is learned sooner.
    """
    while True:
        video = random_video(rng)
        times, end = _view(rng, video, most, apart)
        exchanges = [*_when(video, times, end), *_what(video, times)]
        if exchanges:
            # A long list of names would drown the few tokens of the other answers.
            named = [_name(video, times)] if len(times) <= (MOST_NAMED if apart else SHOTS) else []
            chosen = [*exchanges, *named]
            return Lesson(video, times, tuple(rng.sample(chosen, min(6, len(chosen)))))


def naming_lesson(rng: random.Random) -> Lesson:
    """Names what a few unrelated moments show, most of them in flashes, which are rare: the first lesson."""
    video = random_video(rng)
    shown = (*video.flashes, *video.flashes, *video.borders, *video.nights)
    times: set[float] = set()
    for _ in range(rng.randint(1, MOMENTS)):
        span = rng.choice(shown) if rng.random() < 0.85 else Span(0.0, video.duration_s, "")
        times.add(int((span.start_s + rng.random() * (span.end_s - span.start_s)) * FPS) / FPS)
    said = "; ".join(_seen(video, time) for time in sorted(times))
    return Lesson(video, sorted(times), (("What does each frame show?", f"<answer>{said}</answer>"),))


def _view(rng: random.Random, video: NeedleVideo, most: int, apart: bool) -> tuple[Times, float | None]:
    """Times of the frames, and the time after the last if it is one that can be known."""
    way = rng.random()
    if way < 0.5 and most >= SHOTS:
        count = rng.choice([n for n in (SHOTS, 32, 64, 128) if n <= most])
        return _steps(0.0, video.duration_s, count), video.duration_s
    if way < 0.2:
        times = _steps(0.0, video.duration_s, SHOTS)
    elif way < 0.35 and video.nights:
        times = _steps(video.nights[0].start_s, video.nights[0].end_s, SLOTS)
    else:
        times = _steps(*rng.choice(video.questions).path[-1], SLOTS)
    return (_apart if apart else _in_a_row)(rng, video, times, most), None


def _in_a_row(rng: random.Random, video: NeedleVideo, times: Times, most: int) -> Times:
    """All of `times`, or consecutive ones, in most cases such that a flash is among them."""
    windows = [times[first : first + most] for first in range(max(1, len(times) - most + 1))]
    seen = [w for w in windows if any(span.covers(time) for span in video.flashes for time in w)]
    return rng.choice(seen if seen and rng.random() < 0.7 else windows)


def _apart(rng: random.Random, video: NeedleVideo, times: Times, most: int) -> Times:
    """`most` of `times` in order, above all those that show something."""
    if len(times) <= most:
        return times
    shown = (*video.borders, *video.flashes, *video.flashes, *video.flashes)
    weights = {time: 1 + 3 * sum(span.covers(time) for span in shown) for time in times}
    # The largest of u^(1/w) are a weighted sample without replacement.
    return sorted(sorted(times, key=lambda time: rng.random() ** (1 / weights[time]))[-most:])


def _name(video: NeedleVideo, times: Times) -> tuple[str, str]:
    said = "; ".join(f"{time:.2f} {_seen(video, time)}" for time in times)
    return "Name what each frame shows.", f"<answer>{said}</answer>"


def _when(video: NeedleVideo, times: Times, end: float | None) -> Iterator[tuple[str, str]]:
    until = dict(zip(times, [*times[1:], *([] if end is None else [end])], strict=False))
    for name in (*BORDERS, "night"):
        spans = video.nights if name == "night" else video.borders
        hits = [t for t in times if any(span.name == name and span.covers(t) for span in spans)]
        if 0 < len(hits) <= 2 and all(time in until for time in hits):
            thing = "night" if name == "night" else f"{name} border"
            said = ", ".join(f"{time:.2f} to {until[time]:.2f}" for time in hits)
            # What is looked for is said right before its time, and need not be fetched from the question.
            yield f"When is the {thing} shown?", f"<answer>{thing} at {said}</answer>"


def _what(video: NeedleVideo, times: Times) -> Iterator[tuple[str, str]]:
    for question in video.questions:
        seen = [[t for t in times if start <= t < end] for start, end in question.events]
        if all(seen):
            counted = [hits[0] for hits in seen] if question.kind is Kind.COUNT else []
            yield question.text, answer_text(question.border, question.symbol, question.answer, counted)


def trajectory(lesson: Lesson, wire: WireFormat, number: int) -> tuple[Trajectory, dict[str, RGB]]:
    """The lesson as written turns, and the pixels of its frames by digest."""
    frames = _frames(lesson.video, lesson.times_s)
    followed = [wire.reply(question, (), ended=True) for question, _ in lesson.exchanges[1:]]
    turns = tuple(
        Turn(Written(answer, wire.written(answer)), answer, None, reply)
        for (_, answer), reply in zip(lesson.exchanges, [*followed, None], strict=True)
    )
    played = Trajectory(
        id=EpisodeId(0, f"lesson-{number}", 0),
        wire=wire.name,
        prompt=wire.prompt(lesson.exchanges[0][0], frames),
        turns=turns,
        status=Status.ANSWERED,
    )
    return played, {frame.ref.digest: frame.rgb for frame in frames}


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


def _seen(video: NeedleVideo, time_s: float) -> str:
    night = ["night" for span in video.nights if span.covers(time_s)]
    border = [f"{span.name} border" for span in video.borders if span.covers(time_s)]
    flash = [span.name for span in video.flashes if span.covers(time_s)]
    return ", ".join(night + border + flash) or "nothing"


def _steps(start_s: float, end_s: float, count: int) -> Times:
    return [start_s + (end_s - start_s) * k / count for k in range(count)]
