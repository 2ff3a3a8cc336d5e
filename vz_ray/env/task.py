"""Task: a question about one or more videos."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class AnswerType(StrEnum):
    MULTIPLE_CHOICE = "multiple_choice"
    NUMBER = "number"
    """A number or a formula."""
    OPEN_ENDED = "open_ended"
    """Judged as right or wrong."""
    GRADED = "graded"
    """Judged as right or wrong, and graded from 0 to 5 (Video-MMLU)."""
    CAPTION = "caption"
    """A judge answers `Task.caption_questions` from the caption (VDC, TempCompass)."""


@dataclass(frozen=True, slots=True)
class SubtitleFile:
    """Subtitle file of a video.

    Attributes:
        path: A `.srt` or `.json` file (`vz_ray/video/subtitles.py`).
        offset_s: Subtitle time at the start of the video, seconds.
    """

    path: str
    offset_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CaptionQuestion:
    """A question that a good caption answers.

    Attributes:
        question: Question with its options; the judge sees only the caption.
        answer_type: `GRADED`, or `MULTIPLE_CHOICE` if the question has options.
    """

    question: str
    answer: str
    answer_type: AnswerType = AnswerType.GRADED


@dataclass(frozen=True, slots=True)
class ChatHistory:
    """Conversation before the question.

    Attributes:
        system: System message of the client, in addition to the agent's prompt.
        turns: `(question, answer)` of earlier turns, in order.
    """

    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """One question, with everything needed to run and score its episodes.

    Attributes:
        task_id: Unique within its data file.
        video: Path or URL of the video; empty for a chat without video.
        question: Question shown to the model, with options.
        answer: Ground truth: a letter, a number or a sentence.
        answer_type: Selects the scorer.
        source: Name of the data set.
        kind: Kind of question, for tables (needle world: identify, count, ...).
        evidence_spans: `(start_s, end_s)` of the evidence for the answer, if known.
        extra: Other fields of the record.
        subtitles: Subtitles to show between the frames; optional.
        images: Image files that belong to the question, shown after the overview.
        caption_questions: Questions to answer from a caption; for `CAPTION` only.
        extra_videos: Further videos of the question; a zoom names its video by index.
        chat_history: Conversation before the question; optional.
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
        """All videos, in the order of their indices."""
        return (self.video, *self.extra_videos) if self.video else ()
