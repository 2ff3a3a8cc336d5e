"""`vz-ray eval` end to end: two benchmarks, three modes, a missing video."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.factories import LVB, write_json
from tests.small_run import SmallRun, run_vz_ray
from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config.eval_run import BenchmarkConfig, EvalRunConfig
from vz_ray.data.task_file import read_tasks
from vz_ray.eval.run import load_benchmarks
from vz_ray.utils.errors import UserError

pytestmark = pytest.mark.timeout(600)

MODES = {"agent", "uniform:8", "agent@0.5fps"}
LINES = [{"start": "00:00:00.000", "end": "00:01:50.000", "line": "red green blue"}]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """Needle videos, and a LongVideoBench file about one of the videos and a missing one."""
    small = SmallRun.create(tmp_path_factory.mktemp("small"))
    video = Path(read_tasks(small.data("test"))[0].video)
    rows = [
        {
            **LVB,
            "id": f"q{i}",
            "video_path": name,
            "candidates": ["red", "green", "blue"],
            "duration_group": 60,
        }
        for i, name in enumerate([video.name, video.name, "missing.mp4"])
    ]
    write_json(small.folder / "lvb" / "lvb_val.json", rows)
    write_json(small.folder / "lvb" / "subtitles" / str(LVB["subtitle_path"]), LINES)
    return small


def arguments(small: SmallRun, *overrides: str) -> list[str]:
    return [
        "eval",
        "conf/eval/needle.yaml",
        f"model={small.folder / 'base'}",
        f"runs={small.runs}",
        "name=exam",
        f"data={small.folder}",
        "benchmarks.needle.annotations=needle/test.json",
        "benchmarks.longvideobench.annotations=lvb/lvb_val.json",
        "benchmarks.longvideobench.videos=needle",
        "benchmarks.longvideobench.subtitles=lvb/subtitles",
        "modes=[agent,uniform:8,agent@0.5fps]",
        "episode.max_turn_tokens=24",
        "episode.max_rounds=2",
        "rollout.engine.kv_cache_gib=0.25",
        "eval.bootstrap_resamples=100",
        *overrides,
    ]


def test_missing_videos_raise_before_anything_starts(small: SmallRun) -> None:
    done = run_vz_ray(*arguments(small))
    assert done.returncode == 2
    assert "LongVideoBench: 1 of 2 videos do not exist (1 questions): " in done.stderr
    assert "allow_missing=true" in done.stderr
    assert not (small.runs / "exam").exists()


def test_judged_questions_without_a_judge_raise(tmp_path: Path) -> None:
    video = write_video(tmp_path, VideoSpec("lecture.mp4", frames=25))
    row = f"index\tvideo\tdiscipline\tquestion\tanswer\n0\t{video.stem}\tmath\tWhy?\tBecause.\n"
    (tmp_path / "Video_MMLU.tsv").write_text(row)
    config = EvalRunConfig(benchmarks={"video_mmlu": BenchmarkConfig(annotations=str(tmp_path))})
    with pytest.raises(UserError, match=r"Video-MMLU need a judge.*Set reward\.judge\.model"):
        load_benchmarks(config)


@pytest.fixture(scope="module")
def finished(small: SmallRun) -> tuple[Path, str]:
    """Run directory and standard output of a finished evaluation."""
    done = run_vz_ray(*arguments(small, "allow_missing=true"))
    assert done.returncode == 0, done.stderr
    return small.runs / "exam", done.stdout


def read_report(run: Path) -> dict[str, Any]:
    return json.loads((run / "benchmarks.json").read_text())


def test_metrics_costs_and_exclusions_are_written(finished: tuple[Path, str]) -> None:
    run, output = finished
    benchmarks = read_report(run)["benchmarks"]
    lvb = benchmarks["longvideobench"]
    assert (lvb["questions_released"], lvb["questions_read"], lvb["questions_evaluated"]) == (1337, 3, 2)
    assert (lvb["missing"]["videos"], lvb["missing"]["questions"]) == (1, 1)
    assert set(lvb["modes"]) == MODES
    for benchmark, questions in ((lvb, 2), (benchmarks["needle"], 4)):
        for mode, results in benchmark["modes"].items():
            assert sum(results["answer_status"]["strict"].values()) == questions
            assert results["metrics"]["questions"] == questions
            assert results["metrics"]["seconds_mean"] > 0
            assert results["scores"][0]["count"] == questions
            if mode.endswith("uniform:8"):
                assert results["metrics"]["frames_mean"] == 8
                assert results["metrics"]["zooms_mean"] == 0
    agent = lvb["modes"]["agent"]["scores"]
    assert agent[0]["paper"]["VideoZoomer 7B"] == 57.7
    assert [score["name"] for score in agent if score["table"] == "duration group, s"] == ["60"]
    rows = list(csv.DictReader((run / "benchmarks.csv").open()))
    assert {(row["benchmark"], row["mode"]) for row in rows} == {(key, mode) for key in benchmarks for mode in MODES}
    assert "LongVideoBench, accuracy" in output
    assert "1 of 2 videos are missing; their 1 questions were skipped" in output
    assert "evaluated 2 of 1337 questions" in output


def test_samples_and_subtitles_of_every_question(finished: tuple[Path, str], small: SmallRun) -> None:
    run, _ = finished
    lines = (run / "samples/longvideobench/uniform_8.jsonl").read_text().splitlines()
    # Lines are in completion order.
    assert sorted(json.loads(line)["task"] for line in lines) == ["q0", "q1"]
    assert {"strict", "lenient", "last_turn", "frames", "zooms", "seconds", "reference"} <= set(json.loads(lines[0]))
    from transformers import AutoTokenizer

    from vz_ray.eval.eval_log import read_results

    tokenizer = AutoTokenizer.from_pretrained(small.folder / "base")
    results = read_results(run / "eval/longvideobench/agent.jsonl")
    (first,) = [result for result in results if result.task.task_id == "q0"]
    assert tokenizer.decode(first.trajectory.prompt.compact_ids).count("\nred green blue\n") == 1


def test_several_modes_write_a_curve(finished: tuple[Path, str]) -> None:
    run, _ = finished
    curve = json.loads((run / "curve.json").read_text())["benchmarks"]["longvideobench"]
    series = curve["models"]["model"]
    assert [point["limit"] for point in series["uniform"]] == [8]
    assert [point["limit"] for point in series["agent"]] == [None]
    assert [point["fps"] for point in series["fixed_fps"]] == [0.5]
    assert curve["paper_zooms"] == [0.527, 0.553, 0.57, 0.562, 0.577]
    page = (run / "curve.html").read_text()
    assert page.count("<svg") >= 2
    assert page.rstrip().endswith("</html>")


def test_complete_evaluation_starts_no_engine(finished: tuple[Path, str], small: SmallRun) -> None:
    run, _ = finished
    before = {path: path.read_bytes() for path in sorted((run / "eval").rglob("*.jsonl"))}
    rerun = run_vz_ray(*arguments(small, "allow_missing=true"), timeout_s=200)
    assert rerun.returncode == 0, rerun.stderr
    assert "start engine" not in rerun.stdout
    assert "LongVideoBench, accuracy" in rerun.stdout
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_resume_runs_only_missing_questions(finished: tuple[Path, str], small: SmallRun) -> None:
    """One log line is cut off and one is missing; only these two questions run again."""
    run, _ = finished
    before = read_report(run)
    log, other = run / "eval/needle/agent.jsonl", run / "eval/longvideobench/agent.jsonl"
    lines, untouched = log.read_text().splitlines(keepends=True), other.read_bytes()
    log.write_text("".join(lines[:3]) + lines[3][:50])
    done = run_vz_ray(*arguments(small, "allow_missing=true"))
    assert done.returncode == 0, done.stderr
    after = log.read_text().splitlines(keepends=True)
    assert (after[:3], len(after)) == (lines[:3], len(lines))
    assert other.read_bytes() == untouched
    for key, benchmark in read_report(run)["benchmarks"].items():
        for mode, results in benchmark["modes"].items():
            assert results["scores"] == before["benchmarks"][key]["modes"][mode]["scores"]


@pytest.mark.slow
def test_compare_adds_a_second_model(finished: tuple[Path, str], small: SmallRun) -> None:
    """Both labels name the same checkpoint, so their points are equal."""
    overrides = ["name=compared", f"compare.again={small.folder / 'base'}", "allow_missing=true"]
    done = run_vz_ray(*arguments(small, *overrides))
    assert done.returncode == 0, done.stderr
    run = small.runs / "compared"
    lvb = read_report(run)["benchmarks"]["longvideobench"]
    assert set(lvb["modes"]) == {*MODES, *(f"again/{mode}" for mode in MODES)}
    models = json.loads((run / "curve.json").read_text())["benchmarks"]["longvideobench"]["models"]
    assert set(models) == {"model", "again"}
    for kind, points in models["model"].items():
        assert [(point["accuracy"], point["frames_mean"]) for point in points] == [
            (point["accuracy"], point["frames_mean"]) for point in models["again"][kind]
        ]
