"""Finding videos, sampling questions, and benchmarks by name or by dotted path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.eval.benchmarks.factories import answered, figures, touch, write_json
from vz_ray.env.task import Task
from vz_ray.eval.benchmarks import ADAPTERS, BenchmarkFiles, find_missing_videos, load_benchmark, subsample
from vz_ray.eval.benchmarks.annotation_files import find_annotation_file
from vz_ray.eval.benchmarks.video_folder import VideoFolder
from vz_ray.utils.errors import UserError


def test_videos_are_found_by_path_by_name_and_without_their_ending(tmp_path: Path) -> None:
    folder = VideoFolder(touch(tmp_path, "a/one.mp4", "b/c/two.webm", "x/same.mp4", "y/same.mp4"))
    assert folder.find("a/one.mp4") == str(tmp_path / "a/one.mp4")
    assert folder.find("elsewhere/one.mp4") == str(tmp_path / "a/one.mp4")
    assert folder.find("two") == str(tmp_path / "b/c/two.webm")
    assert folder.find("y/same.mp4") == str(tmp_path / "y/same.mp4")
    assert folder.find("three.mp4") == str(tmp_path / "three.mp4")
    assert folder.find("three") == str(tmp_path / "three.mp4")
    with pytest.raises(UserError, match=r"has 2 videos called same\.mp4"):
        folder.find("same.mp4")


def test_missing_videos_are_counted_with_their_questions(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    names = ["a.mp4", "b.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"]
    tasks = [Task(str(i), str(tmp_path / name), "?", "A") for i, name in enumerate(names)]
    tasks.append(Task("url", "https://example.org/a.mp4", "?", "A"))
    missing = find_missing_videos(tasks)
    assert (len(missing.paths), missing.num_videos, missing.num_questions) == (4, 6, 5)
    assert str(missing).startswith(f"4 of 6 videos do not exist (5 questions): {tmp_path}/b.mp4, ")
    assert str(missing).endswith("d.mp4, ...")


@pytest.mark.parametrize(
    ("strategy", "taken"),
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
def test_sampling_strategies(strategy: str, taken: list[int] | int) -> None:
    found = subsample(range(10), strategy, seed=3)
    if isinstance(taken, list):
        assert found == taken
    else:
        assert len(found) == taken
        assert found == sorted(set(found)) == subsample(range(10), strategy, seed=3)
        assert subsample(range(1000), strategy, seed=3) != subsample(range(1000), strategy, seed=4)


@pytest.mark.parametrize("strategy", ["some", "first", "first:-1", "random:x", "%"])
def test_another_strategy_is_refused(strategy: str) -> None:
    with pytest.raises(ValueError, match="none of all, first:N"):
        subsample([1], strategy)


def test_the_annotation_file_is_found_in_its_folder_or_given(tmp_path: Path) -> None:
    touch(tmp_path, "deep/test.jsonl", "one/x.json", "two/x.json")
    assert find_annotation_file(tmp_path, "no.json", "test.jsonl") == tmp_path / "deep/test.jsonl"
    assert find_annotation_file(tmp_path / "one/x.json", "y.json") == tmp_path / "one/x.json"
    with pytest.raises(UserError, match=r"has several x\.json"):
        find_annotation_file(tmp_path, "x.json")
    with pytest.raises(UserError, match=r"has no y\.json or z\.json"):
        find_annotation_file(tmp_path, "y.json", "z.json")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        find_annotation_file(tmp_path / "nowhere", "x.json")


def rl(number: int, **more: object) -> dict[str, object]:
    return {
        "videos": ["v.mp4"],
        "problem": "<image>Which? A. disc B. cross",
        "solution": "B",
        "data_source": "needle",
        "extra_info": {"answer_type": "multiple_choice"},
        "problem_id": f"q{number}",
        **more,
    }


def test_the_projects_own_files_one_or_a_list(tmp_path: Path) -> None:
    write_json(tmp_path / "one.json", [rl(0), rl(1, solution="3", extra_info={"answer_type": "number"})])
    write_json(tmp_path / "two.json", [rl(0, data_source="other"), rl(1), rl(2)])
    alone = load_benchmark("rl", BenchmarkFiles(tmp_path / "one.json", tmp_path))
    assert (alone.title, [task.answer for task in alone.tasks]) == (f"{tmp_path.name}/one", ["B", "3"])
    assert figures(alone, answered(alone, ["cross", "three"])) == {"accuracy": (1.0, 2)}
    (tmp_path / "sets.yaml").write_text(
        "datasets:\n- json_path: one.json\n- json_path: two.json\n  sampling_strategy: first:2\n"
    )
    both = load_benchmark("rl", BenchmarkFiles(tmp_path / "sets.yaml", tmp_path))
    assert [task.task_id for task in both.tasks] == ["0/q0", "0/q1", "1/q0", "1/q1"]
    found = figures(both, answered(both, ["A", "3", "B", "B"]))
    assert found["data source/other"] == (1.0, 1)
    (tmp_path / "sets.yaml").write_text("datasets:\n- path: one.json\n")
    with pytest.raises(UserError, match="data set 0: expected json_path"):
        load_benchmark("rl", BenchmarkFiles(tmp_path / "sets.yaml", tmp_path))


OWN = """
from vz_ray.env.task import Task
from vz_ray.eval.benchmarks import Benchmark, Figure

def read(source):
    task = Task("t", str(source.videos / "a.mp4"), "?", "A")
    return Benchmark("Mine", (task,), lambda samples: [Figure("accuracy", 0.0, len(samples))])

def twice(source):
    benchmark = read(source)
    return Benchmark("Mine", benchmark.tasks * 2, benchmark.figures)

def nothing(source):
    return None

number = 3
"""


def test_a_benchmark_of_ones_own_is_named_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_benchmark.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    source = BenchmarkFiles(tmp_path, tmp_path)
    assert load_benchmark("own_benchmark:read", source).title == "Mine"
    for name, said in {
        "own_benchmark:twice": "two questions with id 't'",
        "own_benchmark:nothing": "returned NoneType, not a Benchmark",
        "own_benchmark:number": "is no function but int",
        "own_benchmark:other": "cannot import the benchmark",
        "no_such_module:read": "cannot import the benchmark no_such_module:read",
        "lvbenc": "did you mean lvbench",
        "???": "there are mlvu_dev, ",
    }.items():
        with pytest.raises(UserError, match=said):
            load_benchmark(name, source)
    sys.modules.pop("own_benchmark")


def test_annotations_of_another_ending_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.csv")
    for name in ("longvideobench", "videomme", "lvbench", "video_mmlu", "longvideoreason", "clevrer"):
        assert name in ADAPTERS
        with pytest.raises(UserError, match=r"annotations are \.json, \.jsonl, \.tsv, \.parquet files"):
            load_benchmark(name, BenchmarkFiles(tmp_path / "a.csv", tmp_path))
