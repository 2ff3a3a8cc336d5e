"""Annotation files of the released shapes, videos to find, and played answers, made up for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    AnswerJudge,
    Benchmark,
    BenchmarkMetric,
    ScoredResult,
    score_results,
    select_scores,
)
from vz_ray.eval.benchmarks.answer_scoring import judge_from_reward
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
    """Files to be found; nothing looks into them here."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def played(task: Task, text: str, **more: Any) -> EvalResult:
    """An episode of one turn that said `text`."""
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
    return EvalResult(task, replace(trajectory, **more))


def answered(
    benchmark: Benchmark, answers: Sequence[str | None], judge: AnswerJudge = judge_from_reward
) -> list[ScoredResult]:
    """Marks of the benchmark's questions in order; an answer stands in its span, None is none."""
    texts = ["hm" if answer is None else f"<think>t</think><answer>{answer}</answer>" for answer in answers]
    results = [played(task, text) for task, text in zip(benchmark.tasks, texts, strict=True)]
    return score_results(benchmark, results, judge)


def figures(benchmark: Benchmark, marked: Sequence[ScoredResult]) -> dict[str, tuple[float | None, int]]:
    """Strict figures by `table/name`, or name alone: value and count."""
    return by_name(benchmark.compute_metrics(select_scores(marked, lambda sample: sample.strict)))


def by_name(found: Sequence[BenchmarkMetric]) -> dict[str, tuple[float | None, int]]:
    assert len({(figure.table, figure.name) for figure in found}) == len(found)
    return {
        f"{figure.table}/{figure.name}" if figure.table else figure.name: (figure.value, figure.count)
        for figure in found
    }
