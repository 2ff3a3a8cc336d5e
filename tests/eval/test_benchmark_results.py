"""What benchmarks leave behind: figures beside the paper's, tables, a curve, a line per question."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.eval.benchmarks.factories import MME, played, touch, write_parquet
from tests.eval.conftest import frames_at
from vz_ray.config.eval import EvalConfig
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.eval.accuracy_curve import write_curve
from vz_ray.eval.benchmark_results import (
    BenchmarkResults,
    build_benchmark_results,
    write_benchmark_results,
    write_samples,
)
from vz_ray.eval.benchmark_tables import print_benchmark_results
from vz_ray.eval.benchmarks import Benchmark, BenchmarkFiles, MissingVideos, load_benchmark, score_results
from vz_ray.eval.eval_mode import EvalMode
from vz_ray.eval.paper_results import load_paper_results
from vz_ray.report.curve_report import write_curve_report

CONFIG = EvalConfig(bootstrap_resamples=100)


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    rows = [{**MME, "question_id": str(i), "duration": "long" if i > 1 else "short"} for i in range(5)]
    write_parquet(tmp_path / "a.parquet", rows)
    touch(tmp_path, "fFjv93ACGo8.mp4")
    return load_benchmark("videomme", BenchmarkFiles(tmp_path, tmp_path))


def play(benchmark: Benchmark, answers: Sequence[str | None], frames: int) -> list[Any]:
    """Marks of answers from `frames` frames; an answer of None is an episode that failed."""
    results = []
    for task, answer in zip(benchmark.tasks, answers, strict=True):
        text = f"<think>t</think><answer>{answer}</answer>"
        result = played(task, text, prompt=frames_at(range(frames)), seconds=2.0)
        if answer is None:
            gone = replace(
                result.trajectory, status=EpisodeStatus.FAILED, error="the video is broken", turns=()
            )
            result = replace(result, trajectory=gone)
        results.append(result)
    return score_results(benchmark, results)


@pytest.fixture
def found(benchmark: Benchmark) -> tuple[BenchmarkResults, dict[str, Any]]:
    marks = {
        EvalMode.parse("agent"): play(benchmark, ["C", "C", "A", "the answer? C", None], 16),
        EvalMode.parse("uniform:8"): play(benchmark, ["C", "B", "A", "B", "C"], 8),
        EvalMode.parse("agent:0"): play(benchmark, ["C", "C", "C", "C", "C"], 12),
    }
    one = BenchmarkResults("mme", "videomme", benchmark, 5, MissingVideos(("/x/b.mp4",), 2, 3), marks)
    return one, build_benchmark_results([one], CONFIG, {"model": "checkpoints/agent"})


def test_figures_are_read_strictly_and_leniently_and_stand_beside_the_papers(found: Any) -> None:
    _, values = found
    agent = values["benchmarks"]["mme"]["modes"]["agent"]
    overall, long = agent["figures"][:2]
    assert (overall["name"], overall["strict"], overall["lenient"], overall["count"]) == (
        "overall",
        0.5,
        0.5,
        4,
    )
    assert overall["paper"]["VideoZoomer 7B"] == 65.2
    assert (long["strict"], long["count"], long["paper"]["GPT-4o"]) == (0.0, 2, 65.3)
    assert agent["readings"]["strict"] == {
        "read": 3,
        "unparsed": 1,
        "no_answer": 0,
        "unjudged": 0,
        "failed": 1,
    }
    assert agent["metrics"]["accuracy"]["mean"] == 0.5
    assert (agent["metrics"]["unparsed"], agent["metrics"]["invalid"]) == (1, 1)
    assert agent["metrics"]["frames_mean"] == 16
    assert values["benchmarks"]["mme"]["missing"]["questions"] == 3


def test_files_hold_the_same_figures_and_a_line_per_question(found: Any, tmp_path: Path) -> None:
    one, values = found
    write_benchmark_results(tmp_path, values)
    write_samples(tmp_path, one)
    assert json.loads((tmp_path / "benchmarks.json").read_text()) == values
    rows = list(csv.DictReader((tmp_path / "benchmarks.csv").open()))
    first = rows[0]
    assert (first["benchmark"], first["mode"], first["figure"], first["strict"]) == (
        "mme",
        "agent",
        "overall",
        "50.0",
    )
    assert (first["VideoZoomer 7B"], first["missing_questions"], first["failed"]) == ("65.2", "3", "1")
    lines = [json.loads(line) for line in (tmp_path / "samples/mme/agent.jsonl").read_text().splitlines()]
    assert [line["strict"]["reading"] for line in lines] == ["read", "read", "read", "unparsed", "failed"]
    assert lines[0]["strict"]["answer"] == lines[0]["truth"] == "C"
    assert lines[4]["error"] == "the video is broken"


@pytest.mark.parametrize("width", [90, 160])
def test_tables_say_what_was_left_out(found: Any, width: int) -> None:
    out = StringIO()
    print_benchmark_results(found[1], Console(file=out, width=width, force_terminal=True, color_system=None))
    text = out.getvalue()
    assert ("Cost of a question" in text) == (width < 150)
    assert "65.2" in text
    flat = " ".join(text.split())
    assert "VideoMME: 1 of 2 videos do not exist: their 3 questions were left out" in flat
    assert "VideoMME: 5 of 2700 questions were asked" in flat
    assert "VideoMME: agent: 1 questions are in no figure (0 not judged, 1 failed)" in flat
    assert "arXiv 2512.22315" in flat
    assert all(name in text for name in ("uniform:8", "agent:0", "unparsed", "frames", "zooms", "long"))


def test_a_curve_has_uniform_frames_and_zooms_apart(found: Any, tmp_path: Path) -> None:
    write_curve(tmp_path, found[1])
    curve = json.loads((tmp_path / "curve.json").read_text())["benchmarks"]["mme"]["models"]["model"]
    (uniform,) = curve["uniform"]
    assert (uniform["limit"], uniform["accuracy"]["mean"], uniform["frames_mean"]) == (8, 0.4, 8)
    assert [point["limit"] for point in curve["agent"]] == [0, None]
    assert curve["fixed_fps"] == []
    page = write_curve_report(tmp_path).read_text()
    assert "uniform, 8 frames" in page
    assert "agent, 0 zooms" in page
    assert page.count("<svg") == 1  # one number of zooms makes no line, and no rate was fixed


def test_a_curve_shows_fixed_rates_and_a_second_model_each_under_its_name(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    right = {
        "uniform:8": 1, "agent:0": 2, "agent:4": 4, "agent@0.5fps": 2, "agent@4fps": 3,
        "sft/uniform:8": 0, "sft/agent:0": 1, "sft/agent:4": 2, "sft/agent@0.5fps": 1, "sft/agent@4fps": 1,
    }  # fmt: skip
    marks = {
        EvalMode.parse(mode): play(benchmark, ["C"] * count + ["A"] * (5 - count), 8)
        for mode, count in right.items()
    }
    one = BenchmarkResults("mme", "videomme", benchmark, 5, MissingVideos((), 1, 0), marks)
    models = {"model": "checkpoints/agent", "sft": "checkpoints/sft"}
    write_curve(tmp_path, build_benchmark_results([one], CONFIG, models))
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert curve["models"] == models
    found = {
        label: {
            kind: [(at.get("fps", at["limit"]), at["accuracy"]["mean"]) for at in points]
            for kind, points in played.items()
        }
        for label, played in curve["benchmarks"]["mme"]["models"].items()
    }
    assert found["model"] == {
        "uniform": [(8, 0.2)],
        "agent": [(0, 0.4), (4, 0.8)],
        "fixed_fps": [(0.5, 0.4), (4, 0.6)],
    }
    assert found["sft"] == {
        "uniform": [(8, 0.0)],
        "agent": [(0, 0.2), (4, 0.4)],
        "fixed_fps": [(0.5, 0.2), (4, 0.2)],
    }
    page = write_curve_report(tmp_path).read_text()
    assert page.count("<svg") == 3
    assert "Model: checkpoints/agent; sft: checkpoints/sft" in page
    for name in ("model: uniform frames", "sft: agent", "sft: fixed rate", "agent, at most 4 zooms"):
        assert name in page
    assert "<th>sft: agent at 0.5 fps</th>" in page


def test_the_papers_numbers_are_per_cent_of_benchmarks_that_there_are() -> None:
    from vz_ray.eval.benchmarks import ADAPTERS

    assert set(load_paper_results().figures) | set(load_paper_results().zooms) <= set(ADAPTERS)
    values = [
        v
        for figures in load_paper_results().figures.values()
        for models in figures.values()
        for v in models.values()
    ]
    assert all(
        1 < value < 100
        for value in [*values, *(v for row in load_paper_results().zooms.values() for v in row)]
    )
    for benchmark, figures in load_paper_results().figures.items():
        for figure, models in figures.items():
            assert set(load_paper_results().shown) <= set(models), (benchmark, figure)
    # The last of the numbers by zooms is the main table's.
    for benchmark, row in load_paper_results().zooms.items():
        assert len(row) == 5
        headline = next(iter(load_paper_results().figures[benchmark].values()))
        assert row[-1] == headline["VideoZoomer 7B"]
