"""`vz-ray eval` with every part the real one: two benchmarks, three modes, a missing video."""

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
    """Needle videos, and a LongVideoBench file about one of them and one that is not there."""
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
        for i, name in enumerate([video.name, video.name, "gone.mp4"])
    ]
    write_json(small.folder / "lvb" / "lvb_val.json", rows)
    write_json(small.folder / "lvb" / "subtitles" / str(LVB["subtitle_path"]), LINES)
    return small


def arguments(small: SmallRun, *more: str) -> list[str]:
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
        *more,
    ]


def test_missing_videos_stop_it_before_anything_is_started(small: SmallRun) -> None:
    done = run_vz_ray(*arguments(small))
    assert done.returncode == 2
    assert "LongVideoBench: 1 of 2 videos do not exist (1 questions): " in done.stderr
    assert "allow_missing=true" in done.stderr
    assert not (small.runs / "exam").exists()


def test_questions_that_take_a_judge_stop_it_where_there_is_none(tmp_path: Path) -> None:
    video = write_video(tmp_path, VideoSpec("lecture.mp4", frames=25))
    row = f"index\tvideo\tdiscipline\tquestion\tanswer\n0\t{video.stem}\tmath\tWhy?\tBecause.\n"
    (tmp_path / "Video_MMLU.tsv").write_text(row)
    config = EvalRunConfig(benchmarks={"video_mmlu": BenchmarkConfig(annotations=str(tmp_path))})
    with pytest.raises(UserError, match=r"Video-MMLU need a judge.*set reward\.judge\.model"):
        load_benchmarks(config)


@pytest.fixture(scope="module")
def finished(small: SmallRun) -> tuple[Path, str]:
    """The run directory, and what the terminal showed."""
    done = run_vz_ray(*arguments(small, "allow_missing=true"))
    assert done.returncode == 0, done.stderr
    return small.runs / "exam", done.stdout


def found(run: Path) -> dict[str, Any]:
    return json.loads((run / "benchmarks.json").read_text())


def test_figures_costs_and_what_was_left_out_are_written(finished: tuple[Path, str]) -> None:
    run, shown = finished
    benchmarks = found(run)["benchmarks"]
    lvb = benchmarks["longvideobench"]
    assert (lvb["released"], lvb["read"], lvb["asked"]) == (1337, 3, 2)
    assert (lvb["missing"]["videos"], lvb["missing"]["questions"]) == (1, 1)
    assert set(lvb["modes"]) == MODES
    for benchmark, questions in ((lvb, 2), (benchmarks["needle"], 4)):
        for mode, played in benchmark["modes"].items():
            assert sum(played["readings"]["strict"].values()) == questions
            assert played["metrics"]["questions"] == questions
            assert played["metrics"]["seconds_mean"] > 0
            assert played["figures"][0]["count"] == questions
            if mode.endswith("uniform:8"):
                assert played["metrics"]["frames_mean"] == 8
                assert played["metrics"]["zooms_mean"] == 0
    agent = lvb["modes"]["agent"]["figures"]
    assert agent[0]["paper"]["VideoZoomer 7B"] == 57.7
    assert [figure["name"] for figure in agent if figure["table"] == "duration group, s"] == ["60"]
    rows = list(csv.DictReader((run / "benchmarks.csv").open()))
    assert {(row["benchmark"], row["mode"]) for row in rows} == {
        (key, mode) for key in benchmarks for mode in MODES
    }
    assert "LongVideoBench, accuracy" in shown
    assert "1 of 2 videos do not exist: their 1 questions were left out" in shown
    assert "2 of 1337 questions were asked" in shown


def test_every_question_has_its_line_and_saw_the_subtitles(
    finished: tuple[Path, str], small: SmallRun
) -> None:
    run, _ = finished
    lines = (run / "samples/longvideobench/uniform_8.jsonl").read_text().splitlines()
    # In the order in which they ended.
    assert sorted(json.loads(line)["task"] for line in lines) == ["q0", "q1"]
    assert {"strict", "lenient", "said", "frames", "zooms", "seconds", "truth"} <= set(json.loads(lines[0]))
    from transformers import AutoTokenizer

    from vz_ray.eval.eval_log import read_results

    tokenizer = AutoTokenizer.from_pretrained(small.folder / "base")
    results = read_results(run / "eval/longvideobench/agent.jsonl")
    (first,) = [result for result in results if result.task.task_id == "q0"]
    assert tokenizer.decode(first.trajectory.prompt.compact_ids).count("\nred green blue\n") == 1


def test_a_curve_is_drawn_from_several_modes(finished: tuple[Path, str]) -> None:
    run, _ = finished
    curve = json.loads((run / "curve.json").read_text())["benchmarks"]["longvideobench"]
    own = curve["models"]["model"]
    assert [point["limit"] for point in own["uniform"]] == [8]
    assert [point["limit"] for point in own["agent"]] == [None]
    assert [point["fps"] for point in own["fixed_fps"]] == [0.5]
    assert curve["paper_zooms"] == [0.527, 0.553, 0.57, 0.562, 0.577]
    page = (run / "curve.html").read_text()
    assert page.count("<svg") >= 2
    assert page.rstrip().endswith("</html>")


def test_with_nothing_left_to_play_no_engine_is_started(finished: tuple[Path, str], small: SmallRun) -> None:
    run, _ = finished
    before = {path: path.read_bytes() for path in sorted((run / "eval").rglob("*.jsonl"))}
    again = run_vz_ray(*arguments(small, "allow_missing=true"), timeout_s=200)
    assert again.returncode == 0, again.stderr
    assert "start engine" not in again.stdout
    assert "LongVideoBench, accuracy" in again.stdout
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_it_goes_on_where_it_was(finished: tuple[Path, str], small: SmallRun) -> None:
    """One question's line is half written, another's is not there: those two are played, nothing else."""
    run, _ = finished
    before = found(run)
    log, other = run / "eval/needle/agent.jsonl", run / "eval/longvideobench/agent.jsonl"
    lines, untouched = log.read_text().splitlines(keepends=True), other.read_bytes()
    log.write_text("".join(lines[:3]) + lines[3][:50])
    done = run_vz_ray(*arguments(small, "allow_missing=true"))
    assert done.returncode == 0, done.stderr
    after = log.read_text().splitlines(keepends=True)
    assert (after[:3], len(after)) == (lines[:3], len(lines))
    assert other.read_bytes() == untouched
    for key, benchmark in found(run)["benchmarks"].items():
        for mode, played in benchmark["modes"].items():
            assert played["figures"] == before["benchmarks"][key]["modes"][mode]["figures"]


@pytest.mark.slow
def test_a_second_model_is_drawn_beside_the_first(finished: tuple[Path, str], small: SmallRun) -> None:
    """It is the same one here, so its points are the same."""
    compared = ["name=compared", f"compare.again={small.folder / 'base'}", "allow_missing=true"]
    done = run_vz_ray(*arguments(small, *compared))
    assert done.returncode == 0, done.stderr
    run = small.runs / "compared"
    lvb = found(run)["benchmarks"]["longvideobench"]
    assert set(lvb["modes"]) == {*MODES, *(f"again/{mode}" for mode in MODES)}
    models = json.loads((run / "curve.json").read_text())["benchmarks"]["longvideobench"]["models"]
    assert set(models) == {"model", "again"}
    for kind, points in models["model"].items():
        assert [(at["accuracy"], at["frames_mean"]) for at in points] == [
            (at["accuracy"], at["frames_mean"]) for at in models["again"][kind]
        ]
