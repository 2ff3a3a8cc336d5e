"""What happens in a needle video, and the questions about it. Pure: no pixels."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

NUM_SHOTS = 16
"""Shots in a video, and frames in the overview that shows one frame of each."""
SLOTS_PER_SHOT = 8
"""Slots in a shot: a flash fills one slot, a zoom of eight frames sees each once."""

SYMBOLS = ("disc", "cross", "square", "triangle", "ring", "diamond")
BORDERS = ("red", "white", "blue", "yellow")
LETTERS = "ABCDEF"
OPTIONS = " ".join(f"{letter}. {symbol}" for letter, symbol in zip(LETTERS, SYMBOLS, strict=True))


class QuestionKind(StrEnum):
    """What it takes to answer."""

    IDENTIFY = "identify"
    """Which symbol flashes in the one shot with the border."""
    COUNT = "count"
    """How many times a symbol flashes in the one shot with the border."""
    DECOY = "decoy"
    """Two shots have the border and nothing flashes in one of them."""
    DEEP = "deep"
    """The border is shown for only an eighth of a night scene: two zooms."""


@dataclass(frozen=True, slots=True)
class VisibleSpan:
    """Something visible from `start_s` to `end_s` (exclusive), seconds of video time."""

    start_s: float
    end_s: float
    name: str

    def covers(self, time_s: float) -> bool:
        return self.start_s <= time_s < self.end_s


@dataclass(frozen=True, slots=True)
class NeedleQuestion:
    """A question and its truth.

    Attributes:
        kind: What it takes to answer.
        border: Colour of the border it asks about.
        text: As the model reads it, options included.
        answer: A letter or a number.
        symbol: The symbol that flashes.
        events: When the flashes are visible; all must be seen for a count.
        zoom_path: Segments an oracle zooms into, in order, wrong turns included.
        border_spans: Where the border it asks about is shown, in order.
    """

    kind: QuestionKind
    border: str
    text: str
    answer: str
    symbol: str
    events: tuple[tuple[float, float], ...]
    zoom_path: tuple[tuple[float, float], ...]
    border_spans: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class NeedleVideo:
    """One video's timeline.

    Attributes:
        seed: Makes the backgrounds.
        duration_s: Length, seconds.
        borders: When borders are shown, and their colours.
        flashes: When symbols are shown, and which.
        nights: When it is night.
        questions: One per border colour.
    """

    seed: int
    duration_s: float
    borders: tuple[VisibleSpan, ...]
    flashes: tuple[VisibleSpan, ...]
    nights: tuple[VisibleSpan, ...]
    questions: tuple[NeedleQuestion, ...]

    @property
    def shot_s(self) -> float:
        return self.duration_s / NUM_SHOTS


def format_question(kind: QuestionKind, border: str) -> str:
    """The question of `kind` about the border of that colour, options included."""
    if kind is QuestionKind.COUNT:
        return f"How many times does something flash while the {border} border is shown?"
    scene = "In the night scene, what" if kind is QuestionKind.DEEP else "What"
    return f"{scene} flashes while the {border} border is shown? {OPTIONS}"


def _slots(rng: random.Random, count: int) -> list[int]:
    """`count` slots of a shot, no two adjacent, so that flashes stay apart."""
    free = rng.sample(range(SLOTS_PER_SHOT - count + 1), count)
    return [slot + i for i, slot in enumerate(sorted(free))]


class _TimelineBuilder:
    """Places one question after another into free shots."""

    def __init__(self, rng: random.Random, duration_s: float) -> None:
        self.rng, self.shot_s = rng, duration_s / NUM_SHOTS
        self.free = rng.sample(range(NUM_SHOTS), NUM_SHOTS)
        self.borders: list[VisibleSpan] = []
        self.flashes: list[VisibleSpan] = []
        self.nights: list[VisibleSpan] = []
        self.questions: list[NeedleQuestion] = []

    def _shot(self) -> tuple[float, float]:
        start = self.free.pop() * self.shot_s
        return (start, start + self.shot_s)

    def _flash(
        self, within: tuple[float, float], symbol: str, count: int = 1
    ) -> tuple[tuple[float, float], ...]:
        slot_s = (within[1] - within[0]) / SLOTS_PER_SHOT
        starts = [within[0] + slot * slot_s for slot in _slots(self.rng, count)]
        self.flashes += [VisibleSpan(start, start + slot_s, symbol) for start in starts]
        return tuple((start, start + slot_s) for start in starts)

    def add_question(self, kind: QuestionKind, border: str) -> None:
        symbol = self.rng.choice(SYMBOLS)
        count = self.rng.randint(1, 4) if kind is QuestionKind.COUNT else 1
        shot = self._shot()
        path, shown = [shot], []
        if kind is QuestionKind.DEEP:
            self.nights.append(VisibleSpan(*shot, "night"))
            slot_s = self.shot_s / SLOTS_PER_SHOT
            start = shot[0] + self.rng.randrange(SLOTS_PER_SHOT) * slot_s
            path.append((start, start + slot_s))
        if kind is QuestionKind.DECOY:
            other = self._shot()
            shown.append(other)
            path = [other, shot] if other < shot else [shot]
        shown = sorted([*shown, path[-1]])
        self.borders += [VisibleSpan(*span, border) for span in shown]
        events = self._flash(path[-1], symbol, count)
        answer = str(count) if kind is QuestionKind.COUNT else LETTERS[SYMBOLS.index(symbol)]
        self.questions.append(
            NeedleQuestion(
                kind, border, format_question(kind, border), answer, symbol, events, tuple(path), tuple(shown)
            )
        )


def make_video(seed: int, duration_s: float, kinds: tuple[QuestionKind, ...]) -> NeedleVideo:
    """A video of `duration_s` with one question of each of `kinds`, at most one per border colour.

    Raises:
        ValueError: More questions than border colours, or two deep ones.
    """
    if len(kinds) > len(BORDERS):
        raise ValueError(f"{len(kinds)} questions in a video, at most {len(BORDERS)} (one per border colour)")
    if kinds.count(QuestionKind.DEEP) > 1:
        raise ValueError("two deep questions in a video: there is one night scene")
    rng = random.Random(seed)
    builder = _TimelineBuilder(rng, duration_s)
    for kind, border in zip(kinds, rng.sample(BORDERS, len(kinds)), strict=True):
        builder.add_question(kind, border)
    return NeedleVideo(
        seed=seed,
        duration_s=duration_s,
        borders=tuple(builder.borders),
        flashes=tuple(builder.flashes),
        nights=tuple(builder.nights),
        questions=tuple(builder.questions),
    )
