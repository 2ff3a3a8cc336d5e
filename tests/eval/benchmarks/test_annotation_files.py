"""Video lookup, subsampling, annotation files and custom benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.eval.benchmarks.factories import metric_values, score_answers, touch, write_json
from vz_ray.env.task import Task
from vz_ray.eval.benchmarks import ADAPTERS, BenchmarkFiles, find_missing_videos, load_benchmark, subsample
from vz_ray.eval.benchmarks.annotation_files import find_annotation_file
from vz_ray.eval.benchmarks.media_files import VideoFolder
from vz_ray.utils.errors import UserError


def test_video_folder_finds_path_name_and_stem(tmp_path: Path) -> None:
    folder = VideoFolder(touch(tmp_path, "a/one.mp4", "b/c/two.webm", "x/same.mp4", "y/same.mp4"))
    assert folder.find("a/one.mp4") == str(tmp_path / "a/one.mp4")
    assert folder.find("elsewhere/one.mp4") == str(tmp_path / "a/one.mp4")
    assert folder.find("two") == str(tmp_path / "b/c/two.webm")
    assert folder.find("y/same.mp4") == str(tmp_path / "y/same.mp4")
    assert folder.find("three.mp4") == str(tmp_path / "three.mp4")
    assert folder.find("three") == str(tmp_path / "three.mp4")
    with pytest.raises(UserError, match=r"has 2 videos called same\.mp4"):
        folder.find("same.mp4")


def test_missing_videos_are_counted_with_questions(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    names = ["a.mp4", "b.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"]
    tasks = [Task(str(i), str(tmp_path / name), "?", "A") for i, name in enumerate(names)]
    tasks.append(Task("url", "https://example.org/a.mp4", "?", "A"))
    missing = find_missing_videos(tasks)
    assert (len(missing.paths), missing.num_videos, missing.num_questions) == (4, 6, 5)
    assert str(missing).startswith(f"4 of 6 videos do not exist (5 questions): {tmp_path}/b.mp4, ")
    assert str(missing).endswith("d.mp4, ...")


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", list(range(10))),
        ("first:3", [0, 1, 2]),
        ("end:3", [7, 8, 9]),
        ("first:99", list(range(10))),
        ("end:0", []),
        ("50%", 5),
        ("random:4", 4),
    ],
)
def test_subsample_strategies(strategy: str, expected: list[int] | int) -> None:
    items = subsample(range(10), strategy, seed=3)
    if isinstance(expected, list):
        assert items == expected
    else:
        assert len(items) == expected
        assert items == sorted(set(items)) == subsample(range(10), strategy, seed=3)
        assert subsample(range(1000), strategy, seed=3) != subsample(range(1000), strategy, seed=4)


@pytest.mark.parametrize("strategy", ["some", "first", "first:-1", "random:x", "%"])
def test_unknown_strategy_raises(strategy: str) -> None:
    with pytest.raises(ValueError, match="must be all, first:N"):
        subsample([1], strategy)


def test_find_annotation_file_in_folder_or_by_path(tmp_path: Path) -> None:
    touch(tmp_path, "deep/test.jsonl", "one/x.json", "two/x.json")
    assert find_annotation_file(tmp_path, "no.json", "test.jsonl") == tmp_path / "deep/test.jsonl"
    assert find_annotation_file(tmp_path / "one/x.json", "y.json") == tmp_path / "one/x.json"
    with pytest.raises(UserError, match=r"has several x\.json"):
        find_annotation_file(tmp_path, "x.json")
    with pytest.raises(UserError, match=r"has no y\.json or z\.json"):
        find_annotation_file(tmp_path, "y.json", "z.json")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        find_annotation_file(tmp_path / "nowhere", "x.json")


def rl(number: int, **changes: object) -> dict[str, object]:
    return {
        "videos": ["v.mp4"],
        "problem": "<image>Which? A. disc B. cross",
        "solution": "B",
        "data_source": "needle",
        "extra_info": {"answer_type": "multiple_choice"},
        "problem_id": f"q{number}",
        **changes,
    }


def test_rl_tasks_from_one_file_or_a_list(tmp_path: Path) -> None:
    write_json(tmp_path / "one.json", [rl(0), rl(1, solution="3", extra_info={"answer_type": "number"})])
    write_json(tmp_path / "two.json", [rl(0, data_source="other"), rl(1), rl(2)])
    single = load_benchmark("rl", BenchmarkFiles(tmp_path / "one.json", tmp_path))
    assert (single.title, [task.answer for task in single.tasks]) == (f"{tmp_path.name}/one", ["B", "3"])
    assert metric_values(single, score_answers(single, ["cross", "three"])) == {"accuracy": (1.0, 2)}
    (tmp_path / "sets.yaml").write_text(
        "datasets:\n- json_path: one.json\n- json_path: two.json\n  sampling_strategy: first:2\n"
    )
    both = load_benchmark("rl", BenchmarkFiles(tmp_path / "sets.yaml", tmp_path))
    assert [task.task_id for task in both.tasks] == ["0/q0", "0/q1", "1/q0", "1/q1"]
    metrics = metric_values(both, score_answers(both, ["A", "3", "B", "B"]))
    assert metrics["data source/other"] == (1.0, 1)
    (tmp_path / "sets.yaml").write_text("datasets:\n- path: one.json\n")
    with pytest.raises(UserError, match="dataset 0: expected json_path"):
        load_benchmark("rl", BenchmarkFiles(tmp_path / "sets.yaml", tmp_path))


CUSTOM_BENCHMARK = """
from vz_ray.env.task import Task
from vz_ray.eval.benchmarks import Benchmark, BenchmarkMetric

def read(files):
    task = Task("t", str(files.video_dir / "a.mp4"), "?", "A")
    return Benchmark("Mine", (task,), lambda scores: [BenchmarkMetric("accuracy", 0.0, len(scores))])

def duplicate(files):
    benchmark = read(files)
    return Benchmark("Mine", benchmark.tasks * 2, benchmark.compute_metrics)

def no_benchmark(files):
    return None

number = 3
"""


def test_custom_benchmark_loads_by_dotted_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "custom_benchmark.py").write_text(CUSTOM_BENCHMARK)
    monkeypatch.syspath_prepend(tmp_path)
    files = BenchmarkFiles(tmp_path, tmp_path)
    assert load_benchmark("custom_benchmark:read", files).title == "Mine"
    for name, message in {
        "custom_benchmark:duplicate": "two questions with id 't'",
        "custom_benchmark:no_benchmark": "returned NoneType; it must return a Benchmark",
        "custom_benchmark:number": "is int; it must be a function",
        "custom_benchmark:other": "cannot import the benchmark",
        "no_such_module:read": "cannot import the benchmark no_such_module:read",
        "lvbenc": "did you mean lvbench",
        "???": "use one of mlvu_dev, ",
    }.items():
        with pytest.raises(UserError, match=message):
            load_benchmark(name, files)
    sys.modules.pop("custom_benchmark")


def test_unknown_annotation_extension_raises(tmp_path: Path) -> None:
    touch(tmp_path, "a.csv")
    for name in ("longvideobench", "videomme", "lvbench", "video_mmlu", "longvideoreason", "clevrer"):
        assert name in ADAPTERS
        with pytest.raises(UserError, match=r"annotations are \.json, \.jsonl, \.tsv, \.parquet files"):
            load_benchmark(name, BenchmarkFiles(tmp_path / "a.csv", tmp_path))
