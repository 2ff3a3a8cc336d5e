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
        offset_s: What the subtitles' clock shows where the video begins, seconds.
    """

    path: str
    offset_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CaptionQuestion:
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
class ChatHistory:
    """What a conversation held before its question.

    Attributes:
        system: Instructions of whoever asks, beside the agent's own.
        turns: `(question, answer)` of earlier rounds, in order.
    """

    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()


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
        evidence_spans: `(start_s, end_s)` of what must be seen to answer, where known.
        extra: Whatever else the data file said.
        subtitles: Shown between the frames, where they are to be shown.
        images: Images that belong to the question, each a video of one frame; shown after the overview.
        caption_questions: What a caption is asked; for `CAPTION` alone.
        extra_videos: Further videos that the question is about; zooms say which they mean.
        chat_history: The conversation that the question goes on with, where there is one.
    """

    task_id: str
    video: str
    question: str
    answer: str
    answer_type: AnswerType = AnswerType.MULTIPLE_CHOICE
    source: str = ""
    kind: str = ""
    evidence_spans: tuple[tuple[float, float], ...] = ()
    extra: dict[str, object] = field(default_factory=dict)
    subtitles: SubtitleFile | None = None
    images: tuple[str, ...] = ()
    caption_questions: tuple[CaptionQuestion, ...] = ()
    extra_videos: tuple[str, ...] = ()
    chat_history: ChatHistory = ChatHistory()

    @property
    def videos(self) -> tuple[str, ...]:
        """All of them, in the order in which they are counted."""
        return (self.video, *self.extra_videos) if self.video else ()
