"""Timeline of a needle video and its questions, without pixels."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

NUM_SHOTS = 16
"""Shots of a video, and frames of the overview."""
SLOTS_PER_SHOT = 8
"""Slots of a shot. A flash fills one slot; a zoom with eight frames shows each slot once."""

SYMBOLS = ("disc", "cross", "square", "triangle", "ring", "diamond")
BORDERS = ("red", "white", "blue", "yellow")
LETTERS = "ABCDEF"
OPTIONS = " ".join(f"{letter}. {symbol}" for letter, symbol in zip(LETTERS, SYMBOLS, strict=True))


class QuestionKind(StrEnum):
    """Kind of a needle question."""

    IDENTIFY = "identify"
    """Which symbol flashes in the one shot with the border."""
    COUNT = "count"
    """How many times a symbol flashes in the one shot with the border."""
    DECOY = "decoy"
    """Two shots have the border; one shot has no flash."""
    DEEP = "deep"
    """The border is visible for an eighth of a night scene: two zooms."""


@dataclass(frozen=True, slots=True)
class VisibleSpan:
    """Object that is visible from `start_s` to `end_s` (exclusive), seconds of video time."""

    start_s: float
    end_s: float
    name: str

    def covers(self, time_s: float) -> bool:
        return self.start_s <= time_s < self.end_s


@dataclass(frozen=True, slots=True)
class NeedleQuestion:
    """Question and ground truth. Spans are `(start_s, end_s)`.

    Attributes:
        kind: Kind of the question.
        border: Color of the border.
        text: Text for the model, including options.
        answer: Letter or number.
        symbol: Symbol of the flashes.
        evidence_spans: Spans of the flashes. A count requires all spans.
        zoom_path: Segments that the oracle zooms into, in order, including detours.
        border_spans: Spans of the border, in order.
    """

    kind: QuestionKind
    border: str
    text: str
    answer: str
    symbol: str
    evidence_spans: tuple[tuple[float, float], ...]
    zoom_path: tuple[tuple[float, float], ...]
    border_spans: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class NeedleVideo:
    """Timeline of one video.

    Attributes:
        seed: Seed of the backgrounds.
        duration_s: Duration, seconds.
        borders: Spans of the borders, named by color.
        flashes: Spans of the flashes, named by symbol.
        nights: Spans of the night scenes.
        questions: At most one question per border color.
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
    """Format the question of `kind` about a border, including options."""
    if kind is QuestionKind.COUNT:
        return f"How many times does something flash while the {border} border is shown?"
    scene = "In the night scene, what" if kind is QuestionKind.DEEP else "What"
    return f"{scene} flashes while the {border} border is shown? {OPTIONS}"


def _sample_slots(rng: random.Random, count: int) -> list[int]:
    """Sample `count` slots of a shot, no two of them adjacent."""
    slots = rng.sample(range(SLOTS_PER_SHOT - count + 1), count)
    return [slot + i for i, slot in enumerate(sorted(slots))]


class _TimelineBuilder:
    """Builder that places each question into free shots."""

    def __init__(self, rng: random.Random, duration_s: float) -> None:
        self.rng, self.shot_s = rng, duration_s / NUM_SHOTS
        self.free_shots = rng.sample(range(NUM_SHOTS), NUM_SHOTS)
        self.borders: list[VisibleSpan] = []
        self.flashes: list[VisibleSpan] = []
        self.nights: list[VisibleSpan] = []
        self.questions: list[NeedleQuestion] = []

    def _take_shot(self) -> tuple[float, float]:
        start = self.free_shots.pop() * self.shot_s
        return (start, start + self.shot_s)

    def _add_flashes(self, span: tuple[float, float], symbol: str, count: int = 1) -> tuple[tuple[float, float], ...]:
        slot_s = (span[1] - span[0]) / SLOTS_PER_SHOT
        starts = [span[0] + slot * slot_s for slot in _sample_slots(self.rng, count)]
        self.flashes += [VisibleSpan(start, start + slot_s, symbol) for start in starts]
        return tuple((start, start + slot_s) for start in starts)

    def add_question(self, kind: QuestionKind, border: str) -> None:
        symbol = self.rng.choice(SYMBOLS)
        count = self.rng.randint(1, 4) if kind is QuestionKind.COUNT else 1
        shot = self._take_shot()
        path, border_spans = [shot], []
        if kind is QuestionKind.DEEP:
            self.nights.append(VisibleSpan(*shot, "night"))
            slot_s = self.shot_s / SLOTS_PER_SHOT
            start = shot[0] + self.rng.randrange(SLOTS_PER_SHOT) * slot_s
            path.append((start, start + slot_s))
        if kind is QuestionKind.DECOY:
            decoy = self._take_shot()
            border_spans.append(decoy)
            path = [decoy, shot] if decoy < shot else [shot]
        border_spans = sorted([*border_spans, path[-1]])
        self.borders += [VisibleSpan(*span, border) for span in border_spans]
        evidence_spans = self._add_flashes(path[-1], symbol, count)
        answer = str(count) if kind is QuestionKind.COUNT else LETTERS[SYMBOLS.index(symbol)]
        self.questions.append(
            NeedleQuestion(
                kind=kind,
                border=border,
                text=format_question(kind, border),
                answer=answer,
                symbol=symbol,
                evidence_spans=evidence_spans,
                zoom_path=tuple(path),
                border_spans=tuple(border_spans),
            )
        )


def make_video(seed: int, duration_s: float, kinds: tuple[QuestionKind, ...]) -> NeedleVideo:
    """Make a video of `duration_s` with one question for each of `kinds`.

    Raises:
        ValueError: There are more questions than border colors, or two deep questions.
    """
    if len(kinds) > len(BORDERS):
        raise ValueError(f"len(kinds) is {len(kinds)}; it must be at most {len(BORDERS)}, one per border color")
    if kinds.count(QuestionKind.DEEP) > 1:
        raise ValueError("kinds contains several deep questions; a video has one night scene")
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
