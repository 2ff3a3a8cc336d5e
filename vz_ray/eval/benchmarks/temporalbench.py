"""TemporalBench: questions between two captions, and captions.

Source of the metrics: binary accuracy counts each question; multiple-binary
accuracy counts a video, all of whose questions must be right. Captions are
compared with the truth by the cosine of their sentence embeddings, times 100.
"""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.env.task import AnswerType, Task
from vz_ray.eval.benchmarks.aggregation import (
    BenchmarkMetric,
    GroupLabel,
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


def compute_metrics(samples: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Binary and multiple-binary accuracy: overall, by category, by data set."""
    tables: list[tuple[str, GroupLabel, Sequence[str]]] = [
        ("category", lambda task: kind_label(task) or "none", CATEGORIES),
        ("data set", extra_label("dataset"), ()),
    ]
    found = [accuracy_metric(samples, "binary"), multiple_binary(samples, "multiple-binary")]
    for table, label, order in tables:
        groups = group_by(samples, label, order)
        found += [accuracy_metric(members, name, f"{table}, binary") for name, members in groups.items()]
        found += [
            multiple_binary(members, name, f"{table}, multiple-binary") for name, members in groups.items()
        ]
    return found


def multiple_binary(samples: Sequence[TaskScore], name: str, table: str = "") -> BenchmarkMetric:
    """Videos all of whose questions are right."""
    videos = group_by(samples, extra_label("video_name"))
    return mean_metric((min(sample.score for sample in members) for members in videos.values()), name, table)


def compute_caption_metrics(samples: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Mean cosine: overall, and by data set."""
    groups = group_by(samples, extra_label("dataset"))
    return [
        accuracy_metric(samples, "cosine"),
        *(accuracy_metric(members, name, "data set") for name, members in groups.items()),
    ]


def read(source: BenchmarkFiles) -> Benchmark:
    """Reads `temporalbench_short_qa.json` or `temporalbench_long_qa.json`: one file, named in full."""
    file = find_annotation_file(
        source.annotations, "temporalbench_short_qa.json", "temporalbench_long_qa.json"
    )
    videos = VideoFolder(source.video_dir)
    tasks = tuple(_task(record, videos) for record in read_annotations(file, SCHEMA))
    return Benchmark(f"TemporalBench {file.stem.removeprefix('temporalbench_')}", tasks, compute_metrics)


def read_captions(source: BenchmarkFiles) -> Benchmark:
    """Reads `temporalbench_short_caption.json`; without an embedding model nothing of it is measured."""
    file = find_annotation_file(source.annotations, "temporalbench_short_caption.json")
    videos = VideoFolder(source.video_dir)
    tasks = tuple(_caption(record, videos) for record in read_annotations(file, CAPTIONS))
    notes = () if source.embedding_model_dir else ("captions are not measured: `embedding_model` is not set",)
    marker = (
        cosine_scorer(SentenceEmbedder(source.embedding_model_dir))
        if source.embedding_model_dir
        else unscored
    )
    return Benchmark(
        "TemporalBench captions", tasks, compute_caption_metrics, score_answer=marker, notes=notes
    )


def cosine_scorer(embedder: SentenceEmbedder) -> AnswerScorer:
    """Marks a caption by its likeness to the truth; less than none counts as none."""

    def mark(task: Task, text: str) -> AnswerScore:
        return AnswerScore(
            AnswerStatus.PARSED, max(0.0, embedder.cosine_similarity(text, task.answer)), text[:80]
        )

    return mark


def unscored(task: Task, text: str) -> AnswerScore:
    """Nobody can say."""
    return AnswerScore(AnswerStatus.UNJUDGED)


def _dataset(record: AnnotationRecord) -> str:
    """Releases name it `dataset` or `source_dataset`."""
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
        # Not open-ended: the rollout workers' judge is not asked about it.
        answer_type=AnswerType.MULTIPLE_CHOICE,
        source="TemporalBench",
        kind="caption",
        extra={"dataset": _dataset(record)},
    )
