"""Benchmark results: metrics with the paper's values, tables, curve, and one line per question."""

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

from tests.eval.benchmarks.factories import MME, episode_result, touch, write_parquet
from tests.eval.conftest import frames_at
from vz_ray.config.run import EvalConfig
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.eval.accuracy_curve import write_curve
from vz_ray.eval.benchmark_results import (
    BenchmarkResults,
    BenchmarkSelection,
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


def score(benchmark: Benchmark, answers: Sequence[str | None], frames: int) -> list[Any]:
    """Score one answer per task from episodes of `frames` frames; None is a failed episode."""
    results = []
    for task, answer in zip(benchmark.tasks, answers, strict=True):
        text = f"<think>t</think><answer>{answer}</answer>"
        result = episode_result(task, text, prompt=frames_at(range(frames)), seconds=2.0)
        if answer is None:
            failed = replace(result.trajectory, status=EpisodeStatus.FAILED, error="the video is broken", turns=())
            result = replace(result, trajectory=failed)
        results.append(result)
    return score_results(benchmark, results)


def select(benchmark: Benchmark, missing: MissingVideos) -> BenchmarkSelection:
    return BenchmarkSelection("mme", "videomme", benchmark, benchmark.tasks, missing)


@pytest.fixture
def report(benchmark: Benchmark) -> tuple[BenchmarkResults, dict[str, Any]]:
    scores = {
        EvalMode.parse("agent"): score(benchmark, ["C", "C", "A", "the answer? C", None], 16),
        EvalMode.parse("uniform:8"): score(benchmark, ["C", "B", "A", "B", "C"], 8),
        EvalMode.parse("agent:0"): score(benchmark, ["C", "C", "C", "C", "C"], 12),
    }
    results = BenchmarkResults(select(benchmark, MissingVideos(("/x/b.mp4",), 2, 3)), scores)
    return results, build_benchmark_results([results], CONFIG, {"model": "checkpoints/agent"})


def test_report_has_strict_lenient_and_paper_values(report: Any) -> None:
    _, values = report
    agent = values["benchmarks"]["mme"]["modes"]["agent"]
    overall, long = agent["scores"][:2]
    assert (overall["name"], overall["strict"], overall["lenient"], overall["count"]) == (
        "overall",
        0.5,
        0.5,
        4,
    )
    assert overall["paper"]["VideoZoomer 7B"] == 65.2
    assert (long["strict"], long["count"], long["paper"]["GPT-4o"]) == (0.0, 2, 65.3)
    assert agent["answer_status"]["strict"] == {
        "parsed": 3,
        "unparsed": 1,
        "no_answer": 0,
        "unjudged": 0,
        "failed": 1,
    }
    assert agent["metrics"]["accuracy"]["mean"] == 0.5
    assert (agent["metrics"]["unparsed"], agent["metrics"]["invalid"]) == (1, 1)
    assert agent["metrics"]["frames_mean"] == 16
    assert values["benchmarks"]["mme"]["missing"]["questions"] == 3


def test_benchmark_files_and_samples(report: Any, tmp_path: Path) -> None:
    results, values = report
    write_benchmark_results(tmp_path, values)
    write_samples(tmp_path, results)
    assert json.loads((tmp_path / "benchmarks.json").read_text()) == values
    rows = list(csv.DictReader((tmp_path / "benchmarks.csv").open()))
    first = rows[0]
    assert (first["benchmark"], first["mode"], first["metric"], first["strict"]) == (
        "mme",
        "agent",
        "overall",
        "50.0",
    )
    assert (first["VideoZoomer 7B"], first["missing_questions"], first["failed"]) == ("65.2", "3", "1")
    lines = [json.loads(line) for line in (tmp_path / "samples/mme/agent.jsonl").read_text().splitlines()]
    assert [line["strict"]["status"] for line in lines] == [
        "parsed", "parsed", "parsed", "unparsed", "failed",
    ]  # fmt: skip
    assert lines[0]["strict"]["answer"] == lines[0]["reference"] == "C"
    assert lines[4]["error"] == "the video is broken"


@pytest.mark.parametrize("width", [90, 160])
def test_tables_list_exclusions(report: Any, width: int) -> None:
    out = StringIO()
    print_benchmark_results(report[1], Console(file=out, width=width, force_terminal=True, color_system=None))
    text = out.getvalue()
    assert ("Cost per question" in text) == (width < 150)
    assert "65.2" in text
    flat = " ".join(text.split())
    assert "VideoMME: 1 of 2 videos are missing; their 3 questions were skipped" in flat
    assert "VideoMME: evaluated 5 of 2700 questions" in flat
    assert "VideoMME: agent: excluded 1 questions from all metrics (0 not judged, 1 failed)" in flat
    assert "arXiv 2512.22315" in flat
    assert all(name in text for name in ("uniform:8", "agent:0", "unparsed", "frames", "zooms", "long"))


def test_curve_separates_uniform_frames_and_zooms(report: Any, tmp_path: Path) -> None:
    write_curve(tmp_path, report[1])
    curve = json.loads((tmp_path / "curve.json").read_text())["benchmarks"]["mme"]["models"]["model"]
    (uniform,) = curve["uniform"]
    assert (uniform["limit"], uniform["accuracy"]["mean"], uniform["frames_mean"]) == (8, 0.4, 8)
    assert [point["limit"] for point in curve["agent"]] == [0, None]
    assert curve["fixed_fps"] == []
    page = write_curve_report(tmp_path).read_text()
    assert "uniform, 8 frames" in page
    assert "agent, 0 zooms" in page
    assert page.count("<svg") == 1  # no zoom chart with a single limit, no chart without a fixed rate


def test_curve_has_fixed_rates_and_second_model(benchmark: Benchmark, tmp_path: Path) -> None:
    correct = {
        "uniform:8": 1, "agent:0": 2, "agent:4": 4, "agent@0.5fps": 2, "agent@4fps": 3,
        "sft/uniform:8": 0, "sft/agent:0": 1, "sft/agent:4": 2, "sft/agent@0.5fps": 1, "sft/agent@4fps": 1,
    }  # fmt: skip
    scores = {
        EvalMode.parse(mode): score(benchmark, ["C"] * count + ["A"] * (5 - count), 8)
        for mode, count in correct.items()
    }
    results = BenchmarkResults(select(benchmark, MissingVideos((), 1, 0)), scores)
    models = {"model": "checkpoints/agent", "sft": "checkpoints/sft"}
    write_curve(tmp_path, build_benchmark_results([results], CONFIG, models))
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert curve["models"] == models
    series = {
        label: {
            kind: [(point.get("fps", point["limit"]), point["accuracy"]["mean"]) for point in points]
            for kind, points in model_series.items()
        }
        for label, model_series in curve["benchmarks"]["mme"]["models"].items()
    }
    assert series["model"] == {
        "uniform": [(8, 0.2)],
        "agent": [(0, 0.4), (4, 0.8)],
        "fixed_fps": [(0.5, 0.4), (4, 0.6)],
    }
    assert series["sft"] == {
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


def test_paper_results_are_percentages_of_known_benchmarks() -> None:
    from vz_ray.eval.benchmarks import ADAPTERS

    paper = load_paper_results()
    assert set(paper.metrics) | set(paper.accuracy_by_max_zooms) <= set(ADAPTERS)
    by_metric = [values for metrics in paper.metrics.values() for values in metrics.values()]
    values = [value for models in by_metric for value in models.values()]
    values += [value for accuracies in paper.accuracy_by_max_zooms.values() for value in accuracies]
    assert all(1 < value < 100 for value in values)
    for benchmark, metrics in paper.metrics.items():
        for metric, models in metrics.items():
            assert set(paper.models) <= set(models), (benchmark, metric)
    # The accuracy with four zooms equals the main table's.
    for benchmark, accuracies in paper.accuracy_by_max_zooms.items():
        assert len(accuracies) == 5
        headline = next(iter(paper.metrics[benchmark].values()))
        assert accuracies[-1] == headline["VideoZoomer 7B"]
