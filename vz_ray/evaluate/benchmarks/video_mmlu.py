"""Video-MMLU: lecture questions with open answers, judged right or wrong and graded from 0 to 5.

Source of the metric: accuracy and mean grade per discipline, and their means
over the disciplines.
"""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.data.task import AnswerType, Task
from vz_ray.evaluate.benchmarks.benchmark import Benchmark, Source
from vz_ray.evaluate.benchmarks.figures import Figure, Scored, graded
from vz_ray.evaluate.benchmarks.files import Record, Schema, find_file, read_records
from vz_ray.evaluate.benchmarks.videos import VideoFolder

SCHEMA = Schema("Video-MMLU's TSV file", ("index", "video", "discipline", "question", "answer"))


def figures(samples: Sequence[Scored]) -> list[Figure]:
    """Mean over disciplines of accuracy and grade, the micro average, and each discipline."""
    return graded(samples, "discipline")


def read(source: Source) -> Benchmark:
    """Reads the TSV file; videos are named by `video`."""
    records = read_records(find_file(source.annotations, "Video_MMLU.tsv", "*.tsv"), SCHEMA)
    videos = VideoFolder(source.videos)
    return Benchmark("Video-MMLU", tuple(_task(record, videos) for record in records), figures)


def _task(record: Record, videos: VideoFolder) -> Task:
    return Task(
        task_id=record.label("index"),
        video=videos.find(record.text("video").strip()),
        question=record.text("question"),
        answer=record.text("answer"),
        answer_type=AnswerType.GRADED,
        source="Video-MMLU",
        kind=record.text("discipline").strip(),
    )
