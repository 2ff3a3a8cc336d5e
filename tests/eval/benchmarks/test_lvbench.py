"""LVBench: questions with several types, and time references as evidence spans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.factories import metric_values, score_answers, touch, write_jsonl
from vz_ray.eval.benchmarks import BenchmarkFiles, load_benchmark
from vz_ray.eval.benchmarks.lvbench import parse_time_reference
from vz_ray.utils.errors import UserError

QUESTION = "What year appears in the opening caption of the video?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633"


def qa(uid: str, types: list[str], **changes: Any) -> dict[str, Any]:
    return {
        "uid": uid,
        "question": QUESTION,
        "answer": "D",
        "question_type": types,
        "time_reference": "00:15-00:19",
        **changes,
    }


def meta(key: str, *questions: dict[str, Any]) -> dict[str, Any]:
    info = {"duration_minutes": 63, "resolution": {"width": 1280, "height": 720}, "fps": 24.0}
    return {"key": key, "type": "cartoon", "video_info": info, "qa": list(questions)}


def test_question_counts_in_each_of_its_types(tmp_path: Path) -> None:
    rows = [
        meta("Cm73ma6Ibcs", qa("1", ["key information retrieval"]), qa("2", ["reasoning", "summarization"])),
        meta("TiQBTesZUJQ", qa("3", ["reasoning"], time_reference="1:02:03-1:02:10")),
    ]
    write_jsonl(tmp_path / "video_info.meta.jsonl", rows)
    touch(tmp_path, "videos/Cm73ma6Ibcs.mp4")
    benchmark = load_benchmark("lvbench", BenchmarkFiles(tmp_path, tmp_path / "videos"))
    assert [task.evidence_spans for task in benchmark.tasks] == [((15.0, 19.0),)] * 2 + [((3723.0, 3730.0),)]
    assert benchmark.notes == ()
    metrics = metric_values(benchmark, score_answers(benchmark, ["(D) 1633", "D", "A"]))
    assert metrics["accuracy"] == (pytest.approx(2 / 3), 3)
    assert metrics["question type/reasoning"] == (0.5, 2)
    assert metrics["question type/summarization"] == (1.0, 1)
    assert metrics["video type/cartoon"] == (pytest.approx(2 / 3), 3)


@pytest.mark.parametrize(
    ("reference", "events"),
    [
        ("00:15-00:19", ((15.0, 19.0),)),
        ("15:02 - 15:03.5", ((902.0, 903.5),)),
        ("01:00:00-01:00:01", ((3600.0, 3601.0),)),
        ("75:10-75:12", ((4510.0, 4512.0),)),
        ("00:15", ((15.0, 15.0),)),
        ("00:19-00:15", ()),
        ("00:15-00:19, 00:30-00:40", ()),
        ("whole video", ()),
        ("", ()),
    ],
)
def test_parse_time_reference(reference: str, events: tuple[tuple[float, float], ...]) -> None:
    assert parse_time_reference(reference) == events


def test_unparsed_references_and_options_are_noted(tmp_path: Path) -> None:
    questions = [
        qa("1", ["reasoning"], time_reference="?"),
        qa("2", ["reasoning"], question="Which? A, B, C or D"),
    ]
    write_jsonl(tmp_path / "video_info.meta.jsonl", [meta("a", *questions)])
    benchmark = load_benchmark("lvbench", BenchmarkFiles(tmp_path, tmp_path))
    assert benchmark.notes == (
        "1 time references cannot be parsed, first question 1",
        "1 questions have options that cannot be parsed, first 2; only letters count as answers",
    )
    assert metric_values(benchmark, score_answers(benchmark, ["D", "D"]))["accuracy"] == (1.0, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"key": "a", "type": "x", "video_info": {}}, "record 0: field 'qa' is missing"),
        (meta("a", {"uid": "1"}), "record 0, qa 0: field 'question' is missing"),
        (meta("a", qa("1", ["x"], answer="1633")), "qa 0: field 'answer' is '1633' .*a letter"),
        (meta("a", qa("1", [])), "'question_type' is .*expected a non-empty list"),
        (meta("a", qa("1", ["x"]), qa("1", ["x"])), "two questions with id '1'"),
    ],
)
def test_malformed_lvbench_record_raises(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = write_jsonl(tmp_path / "video_info.meta.jsonl", [row])
    with pytest.raises(UserError, match=message):
        load_benchmark("lvbench", BenchmarkFiles(file, tmp_path))


def test_malformed_line_raises_with_line_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"key": 1}\n\n{"key"\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: not JSON"):
        load_benchmark("lvbench", BenchmarkFiles(tmp_path / "a.jsonl", tmp_path))
