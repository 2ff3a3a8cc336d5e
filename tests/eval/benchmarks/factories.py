"""Factories of annotation files, empty videos, images and answered episodes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np

from vz_ray.env.task import Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    RewardParts,
    TokenContext,
    Trajectory,
    Turn,
)
from vz_ray.eval.benchmarks import (
    Benchmark,
    BenchmarkMetric,
    ScoredResult,
    score_results,
    select_scores,
)
from vz_ray.eval.eval_log import EvalResult
from vz_ray.rewards.answer_text import last_answer

LVB: dict[str, Any] = {
    "video_id": "86CxyhFV9MI",
    "question": "In the video, a man in black stands by the lake. What is on his head?",
    "question_wo_referring_query": "What is on his head?",
    "candidates": ["a hat", "a crown", "nothing", "a bird"],
    "correct_choice": 1,
    "position": [854, 900],
    "topic_category": "KH-Knowledge-History",
    "question_category": "T3E",
    "level": "L2-Relation",
    "id": "86CxyhFV9MI_0",
    "video_path": "86CxyhFV9MI.mp4",
    "subtitle_path": "86CxyhFV9MI_en.json",
    "duration_group": 600,
    "starting_timestamp_for_subtitles": 10,
    "duration": 190.16,
    "view_count": 259852,
}
MME: dict[str, Any] = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "How many candles are there?",
    "options": ["A. 1.", "B. 2.", "C. 3.", "D. None of the above."],
    "answer": "C",
}
REASON: dict[str, Any] = {
    "problem_id": 0,
    "problem": "Why does she leave?\nA. She is late.\nB. She is hungry.\nC. It rains.\nD. No reason.",
    "data_type": "video",
    "problem_type": "goal",
    "reasoning": "She looks at the clock.",
    "videos": "longvila_videos/clip.mp4",
    "answer": "<answer>A</answer>",
}


def write_json(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def touch(folder: Path, *names: str) -> Path:
    """Create empty files below `folder`."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def png(width: int, height: int) -> bytes:
    """Encode an image with a red left half and a black right half as PNG."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[:, : width // 2] = (250, 10, 10)
    file = io.BytesIO()
    with av.open(file, "w", format="image2pipe") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def episode_result(task: Task, text: str, **changes: Any) -> EvalResult:
    """Return an episode with the single turn `text`."""
    answer = last_answer(text)
    trajectory = Trajectory(
        EpisodeId(0, task.task_id, 0),
        "clean",
        TokenContext((), ()),
        (Turn(ExternalAction(text, ()), text, None, None),),
        EpisodeStatus.ANSWERED if answer is not None else EpisodeStatus.NO_ANSWER,
        answer=answer,
        reward=RewardParts(0.0, 0.0, 0.0, 0.0),
    )
    return EvalResult(task, replace(trajectory, **changes))


@dataclass(frozen=True)
class JudgedAnswer:
    """Verdict of a judge: correctness in `[0, 1]` and an optional grade from 0 to 5."""

    correctness: float
    grade: float | None = None

    def to_reward(self) -> RewardParts:
        extra = {} if self.grade is None else {"judge_score": self.grade}
        return RewardParts(self.correctness, self.correctness, 0.0, 0.0, extra=extra)


INVALID_REWARD = RewardParts(0.0, 0.0, 0.0, 0.0, valid=False, note="no judge")


def score_answers(
    benchmark: Benchmark,
    answers: Sequence[str | None],
    judge: Callable[[EvalResult], JudgedAnswer | None] | None = None,
) -> list[ScoredResult]:
    """Score one answer per task in order; None is an episode without an answer.

    The verdict of `judge` becomes the reward of an answered episode; None is an invalid reward.
    """
    texts = ["hm" if answer is None else f"<think>t</think><answer>{answer}</answer>" for answer in answers]
    results = [episode_result(task, text) for task, text in zip(benchmark.tasks, texts, strict=True)]
    for index, result in enumerate(results):
        if judge is not None and result.trajectory.answer is not None:
            verdict = judge(result)
            reward = INVALID_REWARD if verdict is None else verdict.to_reward()
            results[index] = replace(result, trajectory=replace(result.trajectory, reward=reward))
    return score_results(benchmark, results)


def metric_values(benchmark: Benchmark, scored: Sequence[ScoredResult]) -> dict[str, tuple[float | None, int]]:
    """Return value and count of each strict metric, by `table/name` or `name`."""
    return values_by_name(benchmark.compute_metrics(select_scores(scored, lambda result: result.strict)))


def values_by_name(metrics: Sequence[BenchmarkMetric]) -> dict[str, tuple[float | None, int]]:
    assert len({(metric.table, metric.name) for metric in metrics}) == len(metrics)
    return {
        f"{metric.table}/{metric.name}" if metric.table else metric.name: (metric.value, metric.count)
        for metric in metrics
    }
