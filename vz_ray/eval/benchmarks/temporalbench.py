"""TemporalBench: choices between two captions, and captioning.

Source of the metrics: binary accuracy is over questions; multiple-binary accuracy
is over videos, and a video counts if all its questions are correct. A caption's
score is the cosine similarity of its sentence embedding to the reference, times 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from vz_ray.env.task import AnswerType, Task
from vz_ray.eval.benchmarks.aggregation import (
    BenchmarkMetric,
    Breakdown,
    TaskLabel,
    TaskScore,
    accuracy_metric,
    accuracy_metrics,
    accuracy_table,
    extra_label,
    group_by,
    kind_label,
    mean_metric,
)
from vz_ray.eval.benchmarks.annotation_files import AnnotationRecord, AnnotationSchema, find_annotation_file
from vz_ray.eval.benchmarks.answer_scoring import AnswerScore, AnswerScorer, AnswerStatus
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles, RecordAdapter
from vz_ray.utils.errors import UserError

SCHEMA = AnnotationSchema("TemporalBench", ("idx", "video_name", "category", "question", "GT"))
CAPTIONS = AnnotationSchema("TemporalBench's captions", ("idx", "video_name", "question", "GT"))
MAX_TOKENS = 256
"""Maximum tokens of a text; longer texts are truncated (source: all-MiniLM-L6-v2)."""
CATEGORIES = (
    "Action Order", "Action Frequency", "Action Type", "Motion Magnitude", "Motion Direction/Orientation",
    "Action Effector", "Event Order", "Others",
)  # fmt: skip


def compute_metrics(scores: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Return binary and multiple-binary accuracy overall, by category and by data set."""
    tables: list[tuple[str, TaskLabel, Sequence[str]]] = [
        ("category", lambda task: kind_label(task) or "none", CATEGORIES),
        ("data set", extra_label("dataset"), ()),
    ]
    metrics = [accuracy_metric(scores, "binary"), multiple_binary(scores, "multiple-binary")]
    for table, label, order in tables:
        groups = group_by(scores, label, order)
        metrics += accuracy_table(scores, f"{table}, binary", label, order)
        metrics += [multiple_binary(members, name, f"{table}, multiple-binary") for name, members in groups.items()]
    return metrics


def multiple_binary(scores: Sequence[TaskScore], name: str, table: str = "") -> BenchmarkMetric:
    """Return the fraction of videos with all questions correct."""
    videos = group_by(scores, extra_label("video_name"))
    return mean_metric((min(score.score for score in members) for members in videos.values()), name, table)


def _dataset(record: AnnotationRecord) -> str:
    """Return the field `dataset`, which some releases call `source_dataset`."""
    return record.text("dataset" if "dataset" in record.values else "source_dataset")


def read_question(record: AnnotationRecord, files: BenchmarkFiles) -> Task:
    return Task(
        task_id=record.label("idx"),
        video=files.videos.find(record.text("video_name")),
        question=record.text("question"),
        answer=record.text("GT").strip(),
        source="TemporalBench",
        kind=record.text("category", empty=True),
        extra={"dataset": _dataset(record), "video_name": record.text("video_name")},
    )


def read_caption(record: AnnotationRecord, files: BenchmarkFiles) -> Task:
    return Task(
        task_id=record.label("idx"),
        video=files.videos.find(record.text("video_name")),
        question=record.text("question"),
        answer=record.text("GT"),
        # Not open-ended, so that the rollout workers do not call the judge.
        answer_type=AnswerType.MULTIPLE_CHOICE,
        source="TemporalBench",
        kind="caption",
        extra={"dataset": _dataset(record)},
    )


def unscored(task: Task, text: str) -> AnswerScore:
    """Exclude every caption from the metrics."""
    return AnswerScore(AnswerStatus.UNJUDGED)


QUESTIONS = RecordAdapter(
    title="TemporalBench",
    file_names=("temporalbench_short_qa.json", "temporalbench_long_qa.json"),
    schema=SCHEMA,
    read_record=read_question,
    compute_metrics=compute_metrics,
)
CAPTION_ADAPTER = RecordAdapter(
    title="TemporalBench captions",
    file_names=("temporalbench_short_caption.json",),
    schema=CAPTIONS,
    read_record=read_caption,
    compute_metrics=accuracy_metrics(Breakdown("data set", extra_label("dataset")), name="cosine"),
    score_answer=unscored,
)


def read(files: BenchmarkFiles) -> Benchmark:
    """Read the short or the long questions; a folder prefers the short ones."""
    file = find_annotation_file(files.annotations, *QUESTIONS.file_names)
    return replace(QUESTIONS(files), title=f"TemporalBench {file.stem.removeprefix('temporalbench_')}")


def read_captions(files: BenchmarkFiles) -> Benchmark:
    """Read the captions; without an embedding model they are not scored."""
    benchmark = CAPTION_ADAPTER(files)
    if files.embedding_model_dir is None:
        return replace(benchmark, notes=("captions are not scored: `embedding_model` is not set",))
    return replace(benchmark, score_answer=cosine_scorer(SentenceEmbedder(files.embedding_model_dir)))


def cosine_scorer(embedder: SentenceEmbedder) -> AnswerScorer:
    """Return a scorer of captions by cosine similarity to the reference, clipped at 0."""

    def score_caption(task: Task, text: str) -> AnswerScore:
        similarity = embedder.cosine_similarity(text, task.answer)
        return AnswerScore(AnswerStatus.PARSED, max(0.0, similarity), text[:80])

    return score_caption


class SentenceEmbedder:
    """Mean of a text model's last hidden states, as in `all-MiniLM-L6-v2`; loaded from a folder on first use.

    Raises:
        UserError: The folder has no model.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise UserError(
                f"no sentence-embedding model at {folder}: config.json is missing; set `embedding_model` to "
                "the folder of a model such as all-MiniLM-L6-v2"
            )
        self.folder = folder
        self._embedding = lru_cache(maxsize=4096)(self._embed)

    def cosine_similarity(self, text: str, other: str) -> float:
        """Return the cosine similarity of two texts, -1 to 1."""
        return float(self._embedding(text) @ self._embedding(other))

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(self.folder), trust_remote_code=False)
        model = AutoModel.from_pretrained(str(self.folder), trust_remote_code=False, use_safetensors=True)
        return tokenizer, model.eval()

    def _embed(self, text: str) -> Any:
        """Return the embedding as a unit vector `[D]`."""
        import torch

        tokenizer, model = self._model
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=MAX_TOKENS)
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state[0]
        mask = tokens["attention_mask"][0].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(0) / mask.sum(), dim=0)
