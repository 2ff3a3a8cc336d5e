"""Video-MMLU: lecture questions with open answers, judged as correct or wrong and graded from 0 to 5.

Source of the metric: accuracy and mean grade per discipline, and their macro averages.
"""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.env.task import AnswerType, Task
from vz_ray.eval.benchmarks.aggregation import BenchmarkMetric, TaskScore, judge_metrics
from vz_ray.eval.benchmarks.annotation_files import (
    AnnotationRecord,
    AnnotationSchema,
    find_annotation_file,
    read_annotations,
)
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles
from vz_ray.eval.benchmarks.video_folder import VideoFolder

SCHEMA = AnnotationSchema("Video-MMLU's TSV file", ("index", "video", "discipline", "question", "answer"))


def compute_metrics(scores: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Return accuracy and grade over disciplines, the micro average, and each discipline."""
    return judge_metrics(scores, "discipline")


def read(files: BenchmarkFiles) -> Benchmark:
    """Read the TSV file; `video` is the file name of the video."""
    records = read_annotations(find_annotation_file(files.annotations, "Video_MMLU.tsv", "*.tsv"), SCHEMA)
    videos = VideoFolder(files.video_dir)
    return Benchmark("Video-MMLU", tuple(_task(record, videos) for record in records), compute_metrics)


def _task(record: AnnotationRecord, videos: VideoFolder) -> Task:
    return Task(
        task_id=record.label("index"),
        video=videos.find(record.text("video").strip()),
        question=record.text("question"),
        answer=record.text("answer"),
        answer_type=AnswerType.GRADED,
        source="Video-MMLU",
        kind=record.text("discipline").strip(),
    )
