"""Summary of a run directory and its tables."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tests.eval.conftest import MakeResult
from vz_ray.eval.eval_log import EvalLog
from vz_ray.eval.run_summary import build_summary, eval_log_path, uniform_stage, write_summary
from vz_ray.eval.summary_tables import print_summary, runs_table
from vz_ray.monitoring import metric_names
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.monitoring.run_dir import record_stage_time


@pytest.fixture
def run_dir(tmp_path: Path, make_result: MakeResult) -> Path:
    """Run directory of five evaluations of ten questions, four steps and two stages."""
    correct = {"cold_start": 4, "sft_continued": 5, "rl": 9, "uniform_8": 2, "uniform_32": 3}
    for stage, count in correct.items():
        log = EvalLog(eval_log_path(tmp_path, stage), {"stage": stage})
        zooms = () if stage.startswith("uniform") else ((13.0,) * 8,)
        overview = range(0, 32, 32 // int(stage[8:])) if stage.startswith("uniform") else (0, 10, 20, 30)
        for i in range(10):
            log.append(make_result(f"t{i}", correct=i < count, zooms=zooms, overview=list(overview), stage=stage))
    with MetricLogger(tmp_path / "metrics.jsonl") as metrics:
        for step in range(3):
            values = {metric_names.MISMATCH_LOGPROB_MAX: 1e-6 * (step + 1), metric_names.MISMATCH_KL: 1e-7}
            metrics.log(step, values | {metric_names.WEIGHT_SYNC_SECONDS: 0.1 * (step + 1)})
        metrics.log(3, {"something/else": 1.0})
    for stage, seconds in (("synth", 10.0), ("rl", 60.0), ("rl", 15.0)):
        record_stage_time(tmp_path, stage, seconds)
    return tmp_path


def test_summary_has_metrics_by_stage(run_dir: Path) -> None:
    summary = write_summary(run_dir)
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert summary["accuracy"] == {
        "cold_start": 0.4,
        "sft_continued": 0.5,
        "rl": 0.9,
        "uniform": {"8": 0.2, "32": 0.3},
    }
    assert summary["frames_mean"]["rl"] == 12
    assert summary["zooms_mean"]["rl"] == 1
    assert summary["valid_zoom_rate"]["rl"] == 1
    assert summary["event_coverage"]["rl"] == 1
    assert summary["mismatch"] == {"logprob_abs_max": 3e-6, "kl": pytest.approx(1e-7)}
    assert summary["weights"] == {"published": 3, "sync_seconds_median": pytest.approx(0.2)}
    assert summary["wall_s"] == {"synth": 10.0, "rl": 75.0, "total": 85.0}


def test_uniform_baseline_has_more_frames_than_agent(run_dir: Path) -> None:
    summary = build_summary(run_dir)
    assert summary["uniform_baseline_frames"] == 32
    assert summary["gain"]["over_uniform"]["mean"] == pytest.approx(0.6)
    assert summary["gain"]["over_cold_start"]["mean"] == pytest.approx(0.5)
    assert summary["gain"]["over_cold_start"]["low"] > 0


def test_reading_accuracy_covers_visible_events_only(run_dir: Path) -> None:
    reading = build_summary(run_dir)["reading_accuracy"]
    assert reading["rl"] == 0.9
    assert reading["uniform"] == {"32": 0.3}  # 8 uniform frames miss the event
    assert reading["uniform_over_rl"] == pytest.approx(0.3 / 0.9)


def test_summary_of_empty_run_omits_stages(tmp_path: Path) -> None:
    summary = write_summary(tmp_path)
    assert summary["accuracy"] == {}
    assert "mismatch" not in summary


def test_table_lists_stages_in_run_order(run_dir: Path) -> None:
    console = Console(file=StringIO(), width=120)
    print_summary(build_summary(run_dir), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    positions = [text.index(title) for title in ("after cold start", "after RL", "uniform, 8", "uniform, 32")]
    assert positions == sorted(positions)
    assert "+50.0 points" in text
    assert "1 min 15 s" in text


def test_failure_modes_are_in_summary_and_table(run_dir: Path) -> None:
    summary = build_summary(run_dir)
    # Every zoom shows the event, so wrong answers are misread; 8 uniform frames miss it.
    assert {k: v for k, v in summary["failures"]["rl"].items() if v} == {"right_evidence_wrong_answer": 1}
    assert {k: v for k, v in summary["failures"]["uniform_8"].items() if v} == {"never_zoomed": 8}
    assert sum(summary["failures"]["cold_start"].values()) == 6
    out = StringIO()
    print_summary(summary, Console(file=out, width=120))
    (row,) = [line for line in out.getvalue().splitlines() if line.lstrip().startswith("right evidence")]
    assert row.split()[4:] == ["60.0", "(6)", "50.0", "(5)", "10.0", "(1)"]
    assert "never zoomed" not in out.getvalue(), "the table must list agent evaluations only"


def test_summary_prints_reasons_of_excluded_questions(tmp_path: Path, make_result: MakeResult) -> None:
    log = EvalLog(eval_log_path(tmp_path, "rl"), {})
    log.append(make_result("a"))
    for task in ("b", "c"):
        log.append(make_result(task, valid=False, note="judge timeout: 30 s"))
    out = StringIO()
    print_summary(build_summary(tmp_path), Console(file=out, width=120))
    assert "after RL: excluded 2 (judge timeout)" in out.getvalue()
    assert "Failure modes" not in out.getvalue()


def test_runs_table_has_medians(run_dir: Path, tmp_path: Path) -> None:
    full = build_summary(run_dir)
    better = {**full, "accuracy": {**full["accuracy"], "rl": 1.0}}
    empty = build_summary(tmp_path / "empty")
    out = StringIO()
    Console(file=out, width=110).print(runs_table({"a": full, "b": better, "c": empty}))
    rows = {line.split()[0]: line.split()[1:] for line in out.getvalue().splitlines() if line.split()[1:]}
    assert rows["accuracy.rl"] == ["0.9", "1", "-", "0.95"]
    assert rows["accuracy.uniform.32"] == ["0.3", "0.3", "-", "0.3"]
    assert "accuracy.uniform.128" not in rows


def test_empty_summary_prints_table(tmp_path: Path) -> None:
    console = Console(file=StringIO())
    print_summary(build_summary(tmp_path), console)
    assert "Evaluation" in console.file.getvalue()  # type: ignore[attr-defined]


def test_uniform_stage_name_has_frames() -> None:
    assert uniform_stage(32) == "uniform_32"
