"""A question about a video."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class AnswerType(StrEnum):
    MULTIPLE_CHOICE = "multiple_choice"
    NUMBER = "number"
    """A number or a formula."""
    OPEN_ENDED = "open_ended"
    """A judge says whether it is right."""
    GRADED = "graded"
    """A judge says whether it is right, and grades it from 0 to 5 (Video-MMLU)."""
    CAPTION = "caption"
    """A judge answers questions from it, the task's `checks` (VDC, TempCompass)."""


@dataclass(frozen=True, slots=True)
class SubtitleFile:
    """Where a video's subtitles are.

    Attributes:
        path: A `.srt` or `.json` file (`vz_ray/video/subtitles.py`).
        starts_s: What the subtitles' clock shows where the video begins, seconds.
    """

    path: str
    starts_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Check:
    """A question that a good caption answers.

    Attributes:
        question: For whoever reads the caption alone, options included.
        answer: The truth.
        answer_type: `GRADED`, or `MULTIPLE_CHOICE` where the question has options.
    """

    question: str
    answer: str
    answer_type: AnswerType = AnswerType.GRADED


@dataclass(frozen=True, slots=True)
class Chat:
    """What a conversation held before its question.

    Attributes:
        system: Instructions of whoever asks, beside the agent's own.
        past: `(question, answer)` of earlier rounds, in order.
    """

    system: str = ""
    past: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """One question, with all that is needed to play and score it.

    Attributes:
        task_id: Unique within its data file.
        video: Path or URL of the video; empty where a chat is about none.
        question: The text shown to the model, options included.
        answer: The ground truth: a letter, a number or a sentence.
        answer_type: How the answer is scored.
        source: Name of the data set.
        kind: Kind of question, for tables (needle world: identify, count, ...).
        events: `(start_s, end_s)` of what must be seen to answer, where known.
        extra: Whatever else the data file said.
        subtitles: Shown between the frames, where they are to be shown.
        pictures: Images that belong to the question, each a video of one frame; shown after the overview.
        checks: What a caption is asked; for `CAPTION` alone.
        more_videos: Further videos that the question is about; zooms say which they mean.
        chat: The conversation that the question goes on with, where there is one.
    """

    task_id: str
    video: str
    question: str
    answer: str
    answer_type: AnswerType = AnswerType.MULTIPLE_CHOICE
    source: str = ""
    kind: str = ""
    events: tuple[tuple[float, float], ...] = ()
    extra: dict[str, object] = field(default_factory=dict)
    subtitles: SubtitleFile | None = None
    pictures: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    more_videos: tuple[str, ...] = ()
    chat: Chat = Chat()

    @property
    def videos(self) -> tuple[str, ...]:
        """All of them, in the order in which they are counted."""
        return (self.video, *self.more_videos) if self.video else ()
