"""TemporalBench: choices between two captions, and captioning.

Source of the metrics: binary accuracy is over questions; multiple-binary accuracy
is over videos, and a video counts if all its questions are correct. A caption's
score is the cosine similarity of its sentence embedding to the reference, times 100.
"""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.env.task import AnswerType, Task
from vz_ray.eval.benchmarks.aggregation import (
    BenchmarkMetric,
    TaskLabel,
    TaskScore,
    accuracy_metric,
    extra_label,
    group_by,
    kind_label,
    mean_metric,
)
from vz_ray.eval.benchmarks.annotation_files import (
    AnnotationRecord,
    AnnotationSchema,
    find_annotation_file,
    read_annotations,
)
from vz_ray.eval.benchmarks.answer_scoring import AnswerScore, AnswerScorer, AnswerStatus
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles
from vz_ray.eval.benchmarks.sentence_embedding import SentenceEmbedder
from vz_ray.eval.benchmarks.video_folder import VideoFolder

SCHEMA = AnnotationSchema("TemporalBench", ("idx", "video_name", "category", "question", "GT"))
CAPTIONS = AnnotationSchema("TemporalBench's captions", ("idx", "video_name", "question", "GT"))
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
        metrics += [accuracy_metric(members, name, f"{table}, binary") for name, members in groups.items()]
        metrics += [multiple_binary(members, name, f"{table}, multiple-binary") for name, members in groups.items()]
    return metrics


def multiple_binary(scores: Sequence[TaskScore], name: str, table: str = "") -> BenchmarkMetric:
    """Return the fraction of videos with all questions correct."""
    videos = group_by(scores, extra_label("video_name"))
    return mean_metric((min(score.score for score in members) for members in videos.values()), name, table)


def compute_caption_metrics(scores: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Return the mean cosine similarity overall and by data set."""
    groups = group_by(scores, extra_label("dataset"))
    return [
        accuracy_metric(scores, "cosine"),
        *(accuracy_metric(members, name, "data set") for name, members in groups.items()),
    ]


def read(files: BenchmarkFiles) -> Benchmark:
    """Read `temporalbench_short_qa.json` or `temporalbench_long_qa.json`; a folder prefers the short file."""
    file = find_annotation_file(files.annotations, "temporalbench_short_qa.json", "temporalbench_long_qa.json")
    videos = VideoFolder(files.video_dir)
    tasks = tuple(_task(record, videos) for record in read_annotations(file, SCHEMA))
    return Benchmark(f"TemporalBench {file.stem.removeprefix('temporalbench_')}", tasks, compute_metrics)


def read_captions(files: BenchmarkFiles) -> Benchmark:
    """Read `temporalbench_short_caption.json`; without an embedding model the captions stay unscored."""
    file = find_annotation_file(files.annotations, "temporalbench_short_caption.json")
    videos = VideoFolder(files.video_dir)
    tasks = tuple(_caption(record, videos) for record in read_annotations(file, CAPTIONS))
    title = "TemporalBench captions"
    if files.embedding_model_dir is None:
        notes = ("captions are not scored: `embedding_model` is not set",)
        return Benchmark(title, tasks, compute_caption_metrics, score_answer=unscored, notes=notes)
    scorer = cosine_scorer(SentenceEmbedder(files.embedding_model_dir))
    return Benchmark(title, tasks, compute_caption_metrics, score_answer=scorer)


def cosine_scorer(embedder: SentenceEmbedder) -> AnswerScorer:
    """Return a scorer of captions by cosine similarity to the reference, clipped at 0."""

    def score_caption(task: Task, text: str) -> AnswerScore:
        similarity = embedder.cosine_similarity(text, task.answer)
        return AnswerScore(AnswerStatus.PARSED, max(0.0, similarity), text[:80])

    return score_caption


def unscored(task: Task, text: str) -> AnswerScore:
    """Exclude every caption from the metrics."""
    return AnswerScore(AnswerStatus.UNJUDGED)


def _dataset(record: AnnotationRecord) -> str:
    """Return the field `dataset`, which some releases call `source_dataset`."""
    return record.text("dataset" if "dataset" in record.values else "source_dataset")


def _task(record: AnnotationRecord, videos: VideoFolder) -> Task:
    return Task(
        task_id=record.label("idx"),
        video=videos.find(record.text("video_name")),
        question=record.text("question"),
        answer=record.text("GT").strip(),
        source="TemporalBench",
        kind=record.text("category", empty=True),
        extra={"dataset": _dataset(record), "video_name": record.text("video_name")},
    )


def _caption(record: AnnotationRecord, videos: VideoFolder) -> Task:
    return Task(
        task_id=record.label("idx"),
        video=videos.find(record.text("video_name")),
        question=record.text("question"),
        answer=record.text("GT"),
        # Not open-ended, so that the rollout workers do not call the judge.
        answer_type=AnswerType.MULTIPLE_CHOICE,
        source="TemporalBench",
        kind="caption",
        extra={"dataset": _dataset(record)},
    )
