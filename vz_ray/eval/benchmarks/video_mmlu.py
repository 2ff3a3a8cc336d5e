"""Video-MMLU: lecture questions with open answers, judged as correct or wrong and graded from 0 to 5.

Source of the metric: accuracy and mean grade per discipline, and their macro averages.
"""

from __future__ import annotations

from functools import partial

from vz_ray.env.task import AnswerType, Task
from vz_ray.eval.benchmarks.aggregation import judge_metrics
from vz_ray.eval.benchmarks.annotation_files import AnnotationRecord, AnnotationSchema
from vz_ray.eval.benchmarks.benchmark import BenchmarkFiles, RecordAdapter


def read_record(record: AnnotationRecord, files: BenchmarkFiles) -> Task:
    return Task(
        task_id=record.label("index"),
        video=files.videos.find(record.text("video").strip()),
        question=record.text("question"),
        answer=record.text("answer"),
        answer_type=AnswerType.GRADED,
        kind=record.text("discipline").strip(),
    )


ADAPTER = RecordAdapter(
    title="Video-MMLU",
    file_names=("Video_MMLU.tsv", "*.tsv"),
    schema=AnnotationSchema("Video-MMLU's TSV file", ("index", "video", "discipline", "question", "answer")),
    read_record=read_record,
    compute_metrics=partial(judge_metrics, table="discipline"),
)
