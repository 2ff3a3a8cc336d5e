"""TemporalBench: questions between two captions, and captions.

Source of the metrics: binary accuracy counts each question; multiple-binary
accuracy counts a video, all of whose questions must be right. Captions are
compared with the truth by the cosine of their sentence embeddings, times 100.
"""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.data.task import AnswerType, Task
from vz_ray.evaluate.benchmarks.benchmark import Benchmark, Source
from vz_ray.evaluate.benchmarks.embedding import Embedder
from vz_ray.evaluate.benchmarks.figures import Figure, Label, Scored, accuracy, by, extra, kind, mean
from vz_ray.evaluate.benchmarks.files import Record, Schema, find_file, read_records
from vz_ray.evaluate.benchmarks.marks import Mark, Marker, Reading
from vz_ray.evaluate.benchmarks.videos import VideoFolder

SCHEMA = Schema("TemporalBench", ("idx", "video_name", "category", "question", "GT"))
CAPTIONS = Schema("TemporalBench's captions", ("idx", "video_name", "question", "GT"))
CATEGORIES = (
    "Action Order", "Action Frequency", "Action Type", "Motion Magnitude", "Motion Direction/Orientation",
    "Action Effector", "Event Order", "Others",
)  # fmt: skip


def figures(samples: Sequence[Scored]) -> list[Figure]:
    """Binary and multiple-binary accuracy: overall, by category, by data set."""
    tables: list[tuple[str, Label, Sequence[str]]] = [
        ("category", lambda task: kind(task) or "none", CATEGORIES),
        ("data set", extra("dataset"), ()),
    ]
    found = [accuracy(samples, "binary"), multiple(samples, "multiple-binary")]
    for table, label, order in tables:
        groups = by(samples, label, order)
        found += [accuracy(members, name, f"{table}, binary") for name, members in groups.items()]
        found += [multiple(members, name, f"{table}, multiple-binary") for name, members in groups.items()]
    return found


def multiple(samples: Sequence[Scored], name: str, table: str = "") -> Figure:
    """Videos all of whose questions are right."""
    videos = by(samples, extra("video_name"))
    return mean((min(sample.score for sample in members) for members in videos.values()), name, table)


def caption_figures(samples: Sequence[Scored]) -> list[Figure]:
    """Mean cosine: overall, and by data set."""
    groups = by(samples, extra("dataset"))
    return [
        accuracy(samples, "cosine"),
        *(accuracy(members, name, "data set") for name, members in groups.items()),
    ]


def read(source: Source) -> Benchmark:
    """Reads `temporalbench_short_qa.json` or `temporalbench_long_qa.json`: one file, named in full."""
    file = find_file(source.annotations, "temporalbench_short_qa.json", "temporalbench_long_qa.json")
    videos = VideoFolder(source.videos)
    tasks = tuple(_task(record, videos) for record in read_records(file, SCHEMA))
    return Benchmark(f"TemporalBench {file.stem.removeprefix('temporalbench_')}", tasks, figures)


def read_captions(source: Source) -> Benchmark:
    """Reads `temporalbench_short_caption.json`; without an embedding model nothing of it is measured."""
    file = find_file(source.annotations, "temporalbench_short_caption.json")
    videos = VideoFolder(source.videos)
    tasks = tuple(_caption(record, videos) for record in read_records(file, CAPTIONS))
    notes = () if source.embedding_model else ("captions are not measured: `embedding_model` is not set",)
    marker = by_cosine(Embedder(source.embedding_model)) if source.embedding_model else not_measured
    return Benchmark("TemporalBench captions", tasks, caption_figures, mark=marker, notes=notes)


def by_cosine(embedder: Embedder) -> Marker:
    """Marks a caption by its likeness to the truth; less than none counts as none."""

    def mark(task: Task, text: str) -> Mark:
        return Mark(Reading.READ, max(0.0, embedder.cosine(text, task.answer)), text[:80])

    return mark


def not_measured(task: Task, text: str) -> Mark:
    """Nobody can say."""
    return Mark(Reading.UNJUDGED)


def _dataset(record: Record) -> str:
    """Releases name it `dataset` or `source_dataset`."""
    return record.text("dataset" if "dataset" in record.values else "source_dataset")


def _task(record: Record, videos: VideoFolder) -> Task:
    return Task(
        task_id=record.label("idx"),
        video=videos.find(record.text("video_name")),
        question=record.text("question"),
        answer=record.text("GT").strip(),
        source="TemporalBench",
        kind=record.text("category", empty=True),
        extra={"dataset": _dataset(record), "video_name": record.text("video_name")},
    )


def _caption(record: Record, videos: VideoFolder) -> Task:
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
