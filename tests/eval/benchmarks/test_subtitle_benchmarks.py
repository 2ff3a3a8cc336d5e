"""LongVideoBench and VideoMME: records, breakdowns and subtitles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.factories import (
    LVB,
    MME,
    metric_values,
    score_answers,
    touch,
    write_json,
    write_parquet,
)
from vz_ray.env.task import SubtitleFile
from vz_ray.eval.benchmarks import BenchmarkFiles, load_benchmark
from vz_ray.utils.errors import UserError

LINES = [{"start": "00:00:10.500", "end": "00:00:12.000", "line": "Good morning"}]
SRT = "1\n00:00:01,000 --> 00:00:02,000\nHello\n"


def lvb(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {**LVB, "id": f"86CxyhFV9MI_{number}", **changes}


def mme(number: int, **changes: Any) -> dict[str, Any]:
    return {**MME, "question_id": f"001-{number}", **changes}


def test_longvideobench_with_three_to_five_options(tmp_path: Path) -> None:
    rows = [
        lvb(0),
        lvb(1, candidates=["one", "two", "three"], correct_choice=2, duration_group=15),
        lvb(2, candidates=list("vwxyz"), correct_choice=4, question_category="SSS", duration_group=3600),
        lvb(3, duration_group=600),
    ]
    write_json(tmp_path / "lvb_val.json", rows)
    touch(tmp_path, "videos/86CxyhFV9MI.mp4")
    benchmark = load_benchmark("longvideobench", BenchmarkFiles(tmp_path, tmp_path / "videos"))
    assert [task.answer for task in benchmark.tasks] == ["B", "C", "E", "B"]
    assert benchmark.tasks[0].question == (
        "In the video, a man in black stands by the lake. What is on his head?\n"
        "A. a hat\nB. a crown\nC. nothing\nD. a bird"
    )
    assert benchmark.tasks[0].subtitles is None
    # D is not an option of the question with three options.
    scored = score_answers(benchmark, ["a crown", "D", "e.", "A"])
    assert [result.strict.status for result in scored] == ["parsed", "unparsed", "parsed", "parsed"]
    metrics = metric_values(benchmark, scored)
    assert metrics["accuracy"] == (0.5, 4)
    groups = {name: value for name, value in metrics.items() if name.startswith("duration group")}
    assert groups == {
        "duration group, s/15": (0.0, 1),
        "duration group, s/600": (0.5, 2),
        "duration group, s/3600": (1.0, 1),
    }
    assert metrics["category/T3E"] == (pytest.approx(1 / 3), 3)


def test_longvideobench_subtitles_have_an_offset(tmp_path: Path) -> None:
    write_json(tmp_path / "lvb_val.json", [lvb()])
    write_json(tmp_path / "subtitles" / "86CxyhFV9MI_en.json", LINES)
    source = BenchmarkFiles(tmp_path, tmp_path, subtitle_dir=tmp_path / "subtitles")
    (task,) = load_benchmark("longvideobench", source).tasks
    assert task.subtitles == SubtitleFile(str(tmp_path / "subtitles/86CxyhFV9MI_en.json"), 10.0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.json", LINES, "1 of 1 subtitle files do not exist, first .*86CxyhFV9MI_en.json"),
        ("86CxyhFV9MI_en.json", [{"line": "x"}], "line 0: expected start, end and line"),
    ],
)
def test_invalid_subtitles_raise_when_loading(tmp_path: Path, name: str, content: Any, message: str) -> None:
    write_json(tmp_path / "lvb_val.json", [lvb()])
    write_json(tmp_path / "subtitles" / name, content)
    with pytest.raises(UserError, match=message):
        load_benchmark("longvideobench", BenchmarkFiles(tmp_path, tmp_path, subtitle_dir=tmp_path / "subtitles"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct_choice": 4}, "'correct_choice' is 4 .*an index from 0 to 3"),
        ({"correct_choice": "B"}, "'correct_choice' is 'B' .*an integer"),
        ({"duration_group": 30}, "one of 15, 60, 600, 3600"),
        ({"candidates": []}, "a list of 2 to 10 options"),
        ({"question": " "}, "'question' is ' ' .*expected text"),
    ],
)
def test_malformed_longvideobench_field_raises(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write_json(tmp_path / "lvb_val.json", [lvb(0), lvb(1, **change)])
    with pytest.raises(UserError, match=f"lvb_val.json, record 1: field .*{message}"):
        load_benchmark("longvideobench", BenchmarkFiles(file, tmp_path))


def test_other_longvideobench_versions_are_recognized(tmp_path: Path) -> None:
    test_set = {key: value for key, value in lvb().items() if key != "correct_choice"}
    with pytest.raises(UserError, match=r"it is lvb_test_wo_gt\.json"):
        load_benchmark("longvideobench", BenchmarkFiles(write_json(tmp_path / "a.json", [test_set]), tmp_path))
    toolkit = {key: value for key, value in lvb().items() if key != "candidates"} | {"option0": "a hat"}
    with pytest.raises(UserError, match="it is the layout of an evaluation toolkit"):
        load_benchmark("longvideobench", BenchmarkFiles(write_json(tmp_path / "b.json", [toolkit]), tmp_path))
    damaged = {key: value for key, value in lvb().items() if key != "level"}
    with pytest.raises(UserError, match=r"'level' is missing.*another version of the file, or damaged"):
        load_benchmark("longvideobench", BenchmarkFiles(write_json(tmp_path / "c.json", [damaged]), tmp_path))


@pytest.fixture
def mme_folder(tmp_path: Path) -> Path:
    rows = [
        mme(1),
        mme(2, duration="long", videoID="x", domain="Film"),
        mme(3, duration="long", task_type="OCR"),
        mme(4),
    ]
    write_parquet(tmp_path / "videomme" / "test-00000-of-00001.parquet", rows)
    touch(tmp_path, "data/fFjv93ACGo8.mp4", "data/x.mp4")
    return tmp_path


def test_videomme_metrics_by_duration_domain_and_task(mme_folder: Path) -> None:
    benchmark = load_benchmark("videomme", BenchmarkFiles(mme_folder, mme_folder / "data"))
    first = benchmark.tasks[0]
    assert first.question == "How many candles are there?\nA. 1.\nB. 2.\nC. 3.\nD. None of the above."
    assert first.video.endswith("data/fFjv93ACGo8.mp4")
    metrics = metric_values(benchmark, score_answers(benchmark, ["C. 3.", "3", "B", "c"]))
    assert metrics["overall"] == (0.75, 4)
    assert metrics["long"] == (0.5, 2)
    assert metrics["duration/short"] == (1.0, 2)
    assert metrics["domain/Film"] == (1.0, 1)
    assert metrics["task/OCR"] == (0.0, 1)


def test_videomme_videos_without_subtitles_are_noted(mme_folder: Path) -> None:
    folder = touch(mme_folder / "subtitle")
    folder.mkdir()
    (folder / "x.srt").write_text(SRT)
    benchmark = load_benchmark("videomme", BenchmarkFiles(mme_folder, mme_folder / "data", subtitle_dir=folder))
    assert [task.subtitles is not None for task in benchmark.tasks] == [False, True, False, False]
    assert benchmark.notes == ("1 videos have no subtitles",)


def test_subtitle_folder_without_matches_raises(mme_folder: Path) -> None:
    with pytest.raises(UserError, match=r"must have files such as fFjv93ACGo8\.srt"):
        load_benchmark("videomme", BenchmarkFiles(mme_folder, mme_folder / "data", subtitle_dir=mme_folder))


def test_invalid_parquet_file_raises(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet"):
        load_benchmark("videomme", BenchmarkFiles(tmp_path, tmp_path))


def test_videomme_answer_without_option_raises(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [mme(1, answer="E")])
    with pytest.raises(UserError, match=r"'answer' is 'E' .*a letter from A to D"):
        load_benchmark("videomme", BenchmarkFiles(tmp_path, tmp_path))
