"""Task types: a question about a video, and everything needed to run and score it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class AnswerType(StrEnum):
    MULTIPLE_CHOICE = "multiple_choice"
    NUMBER = "number"
    """A number or a formula."""
    OPEN_ENDED = "open_ended"
    """Scored by a judge: correct or not."""
    GRADED = "graded"
    """Scored by a judge: correct or not, and a grade from 0 to 5 (Video-MMLU)."""
    CAPTION = "caption"
    """Scored by a judge that answers the task's `caption_questions` from it (VDC, TempCompass)."""


@dataclass(frozen=True, slots=True)
class SubtitleFile:
    """Subtitle file of a video.

    Attributes:
        path: `.srt` or `.json` file (`vz_ray/video/subtitles.py`).
        offset_s: Subtitle time at the start of the video, seconds.
    """

    path: str
    offset_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CaptionQuestion:
    """A question to answer from a caption.

    Attributes:
        question: Text of the question, including options.
        answer: Ground truth.
        answer_type: `GRADED`, or `MULTIPLE_CHOICE` for questions with options.
    """

    question: str
    answer: str
    answer_type: AnswerType = AnswerType.GRADED


@dataclass(frozen=True, slots=True)
class ChatHistory:
    """Earlier rounds of a conversation.

    Attributes:
        system: Additional system prompt of the client.
        turns: `(question, answer)` of each earlier round, in order.
    """

    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """One question with everything needed to run and score it.

    Attributes:
        task_id: Unique id within the data file.
        video: Path or URL of the video; empty for a chat without a video.
        question: Text for the model, including options.
        answer: Ground truth: a letter, a number or a sentence.
        answer_type: How the answer is scored.
        source: Name of the data set.
        kind: Question kind, for tables (needle world: identify, count, ...).
        evidence_spans: Optional `(start_s, end_s)` of the evidence.
        extra: Remaining fields of the data file.
        subtitles: Optional subtitles, shown between the frames.
        images: Images of the question, each stored as a video of one frame; shown after the overview.
        caption_questions: Questions to a caption; only for `CAPTION`.
        extra_videos: Further videos. Zoom calls then contain the number of the video.
        chat_history: Earlier rounds of the conversation.
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
        """All videos in order."""
        return (self.video, *self.extra_videos) if self.video else ()
