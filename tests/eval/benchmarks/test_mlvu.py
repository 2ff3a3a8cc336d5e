"""MLVU in both layouts, with hand-computed M-Avg and micro average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.factories import JudgedAnswer, metric_values, score_answers, touch, write_json, write_parquet
from vz_ray.env.task import AnswerType
from vz_ray.eval.benchmarks import BenchmarkFiles, find_missing_videos, load_benchmark
from vz_ray.eval.benchmarks.mlvu import CHOICE_FILES, CHOICE_TASKS
from vz_ray.utils.errors import UserError


def dev(task: str, answer: str = "Blue", **changes: Any) -> dict[str, Any]:
    """Return a record of the dev set; the needle file uses another task name."""
    return {
        "video": f"{task}_1.mp4",
        "duration": 480.03,
        "question": "What colour is the coat?",
        "candidates": ["Red", "Blue", "Green", "Yellow"],
        "answer": answer,
        "question_type": "findNeedle" if task == "needle" else task,
        **changes,
    }


def lettered_row(**changes: Any) -> dict[str, Any]:
    return {
        "video_name": "2_needle/needle_32.mp4",
        "question": "What is hidden?\n(A) 猫\n(B) a dog\n(C) a hat\n(D) nothing",
        "candidates": ["猫", "a dog", "a hat", "nothing"],
        "answer": "B",
        "task_type": "needle",
        "question_id": "Q7",
        **changes,
    }


@pytest.fixture
def dev_folder(tmp_path: Path) -> Path:
    """All seven files: three questions of plotQA, one of each other task."""
    for name, task in zip(CHOICE_FILES, CHOICE_TASKS, strict=True):
        rows = [dev(task)] if task != "plotQA" else [dev(task), dev(task, "Red"), dev(task, "Yellow")]
        write_json(tmp_path / "json" / name, rows)
        # Two folders have a video of this name; the annotation file decides.
        touch(tmp_path / "video", f"{name.removesuffix('.json')}/{task}_1.mp4", f"9_summary/{task}_1.mp4")
    return tmp_path


def test_dev_set_in_released_layout(dev_folder: Path) -> None:
    source = BenchmarkFiles(dev_folder / "json", dev_folder / "video")
    benchmark = load_benchmark("mlvu_dev", source)
    assert [task.task_id for task in benchmark.tasks[:4]] == [
        "1_plotQA/0",
        "1_plotQA/1",
        "1_plotQA/2",
        "2_needle/0",
    ]
    first = benchmark.tasks[0]
    assert first.question == "What colour is the coat?\nA. Red\nB. Blue\nC. Green\nD. Yellow"
    assert [task.answer for task in benchmark.tasks[:3]] == ["B", "A", "D"]
    assert first.video.endswith("video/1_plotQA/plotQA_1.mp4")
    assert not find_missing_videos(benchmark.tasks).paths
    assert benchmark.num_released == 2174


def test_m_avg_weights_tasks_and_micro_weights_questions(dev_folder: Path) -> None:
    benchmark = load_benchmark("mlvu_dev", BenchmarkFiles(dev_folder / "json", dev_folder / "video"))
    # Correct: 1 of 3 plotQA, needle, ego, count. Wrong: the other three tasks.
    metrics = metric_values(
        benchmark, score_answers(benchmark, ["B", "B", None, "(B)", "Blue", "b", "C", "I see", "D"])
    )
    assert metrics["task/plotQA"] == (pytest.approx(1 / 3), 3)
    assert metrics["task/order"] == (0.0, 1)
    assert metrics["M-Avg"] == (pytest.approx((1 / 3 + 3) / 7), 9)
    assert metrics["micro"] == (pytest.approx(4 / 9), 9)
    assert list(metrics)[2:] == [f"task/{task}" for task in CHOICE_TASKS]


def test_layout_with_letters(tmp_path: Path) -> None:
    rows = [lettered_row(), lettered_row(question="What is hidden?", question_id="Q8", answer="(A)")]
    touch(tmp_path, "2_needle/needle_32.mp4")
    write_parquet(tmp_path / "mlvu.parquet", rows)
    file = write_json(tmp_path / "mlvu.json", rows)
    benchmark = load_benchmark("mlvu_dev", BenchmarkFiles(file, tmp_path))
    assert load_benchmark("mlvu_dev", BenchmarkFiles(tmp_path / "mlvu.parquet", tmp_path)).tasks == benchmark.tasks
    assert len(load_benchmark("mlvu_test", BenchmarkFiles(file, tmp_path)).tasks) == 2
    first, second = benchmark.tasks
    assert (first.task_id, first.kind, first.answer) == ("needle/Q7", "needle", "B")
    assert first.question == rows[0]["question"]
    assert second.question.endswith("\nA. 猫\nB. a dog\nC. a hat\nD. nothing")
    assert metric_values(benchmark, score_answers(benchmark, ["a dog", "猫"]))["micro"] == (1.0, 2)


def test_open_ended_tasks_exclude_unjudged_answers(tmp_path: Path) -> None:
    row = {
        "video": "s.mp4",
        "duration": 1.5,
        "question": "What happens?",
        "answer": "A man falls.",
        "scoring_points": ["man", "falls"],
    }
    for name, task in (("8_sub_scene.json", "subPlot"), ("9_summary.json", "summary")):
        write_json(tmp_path / name, [{**row, "question_type": task}] * 2)
    benchmark = load_benchmark("mlvu_dev_open", BenchmarkFiles(tmp_path, tmp_path))
    assert {task.answer_type for task in benchmark.tasks} == {AnswerType.OPEN_ENDED}
    verdicts = {
        "8_sub_scene/0": JudgedAnswer(True),
        "8_sub_scene/1": None,
        "9_summary/0": JudgedAnswer(False),
    }
    scored = score_answers(benchmark, ["x", "x", "x", None], lambda r: verdicts[r.task.task_id])
    assert [result.strict.status for result in scored] == ["parsed", "unjudged", "parsed", "no_answer"]
    metrics = metric_values(benchmark, scored)
    assert metrics["accuracy"] == (pytest.approx(1 / 3), 3)
    assert metrics["task/sub_scene"] == (1.0, 1)


def question(number: int, kind: str) -> dict[str, Any]:
    return {
        "video": f"test_{number}.mp4",
        "question": "Which?",
        "candidates": ["one", "two", "three", "four", "five", "six"],
        "question_type": kind,
        "question_id": f"{kind[:2].upper()}_{number}",
    }


@pytest.mark.parametrize(
    "references",
    [
        {"TU_0": "F", "TU_1": "two", "SP_2": "(C)"},
        [{"question_id": name, "answer": a} for name, a in (("TU_0", "six"), ("TU_1", "B"), ("SP_2", "C"))],
    ],
)
def test_test_set_reads_answers_from_second_file(tmp_path: Path, references: Any) -> None:
    rows = [question(0, "tutorialQA"), question(1, "tutorialQA"), question(2, "sportsQA")]
    write_json(tmp_path / "test_question.json", rows)
    answers = write_json(tmp_path / "answers.json", references)
    benchmark = load_benchmark("mlvu_test", BenchmarkFiles(tmp_path, tmp_path, answer_file=answers))
    assert [task.answer for task in benchmark.tasks] == ["F", "B", "C"]
    metrics = metric_values(benchmark, score_answers(benchmark, ["F", "A", "C"]))
    assert metrics["M-Avg"] == (0.75, 3)
    assert metrics["micro"] == (pytest.approx(2 / 3), 3)


def test_test_set_without_answers_raises(tmp_path: Path) -> None:
    write_json(tmp_path / "test_question.json", [question(0, "ego")])
    with pytest.raises(UserError, match="set `answers`"):
        load_benchmark("mlvu_test", BenchmarkFiles(tmp_path, tmp_path))
    answers = write_json(tmp_path / "answers.json", {"EG_1": "A"})
    with pytest.raises(UserError, match=r"no answer to question EG_0 \(.*record 0\)"):
        load_benchmark("mlvu_test", BenchmarkFiles(tmp_path, tmp_path, answer_file=answers))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [dev("plotQA", "Purple")],
            r"record 0: field 'answer' is 'Purple' \(str\); expected the text of one of",
        ),
        ([dev("plotQA"), dev("plotQA", answer=None)], r"record 1: field 'answer' is None \(NoneType\)"),
        ([dev("plotQA", candidates=["one"])], "a list of 2 to 10 options"),
        ([dev("plotQA", duration="long")], r"'duration' is 'long' \(str\); expected a number"),
        ([question(0, "ego")], "it is MLVU test"),
        ([dev("plotQA"), lettered_row()], "record 1: field 'video' is missing.*cannot be mixed"),
        ([lettered_row(answer="E")], "expected a letter from A to D"),
        ([], "has 0 records"),
        ({"a": 1}, "expected a list of records, got dict"),
        ([3], r"record 0: expected an object with .*got 3 \(int\)"),
    ],
)
def test_malformed_dev_record_raises(tmp_path: Path, rows: Any, message: str) -> None:
    file = write_json(tmp_path / "1_plotQA.json", rows)
    with pytest.raises(UserError, match=message):
        load_benchmark("mlvu_dev", BenchmarkFiles(file, tmp_path))


def test_missing_dev_file_raises(dev_folder: Path) -> None:
    (dev_folder / "json" / "5_order.json").unlink()
    with pytest.raises(UserError, match=r"has no 5_order\.json"):
        load_benchmark("mlvu_dev", BenchmarkFiles(dev_folder / "json", dev_folder / "video"))
