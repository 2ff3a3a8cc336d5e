"""HTML report of an ablation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vz_ray.config.ablation import VARIANTS
from vz_ray.monitoring import metric_names
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.report.ablation_report import VARIANT_COLORS, write_ablation_report
from vz_ray.utils.errors import UserError

INTERVAL = {"mean": 0.6, "low": 0.55, "high": 0.64, "count": 2000}


def make_variant(**changes: object) -> dict[str, object]:
    run = {"accuracy": 0.6, "zooms": 1.2}
    return {
        "accuracy": INTERVAL,
        "zooms": {**INTERVAL, "mean": 1.2, "low": 1.1, "high": 1.3},
        "frames_mean": 24.0,
        "zoom_call_rate": 1.0,
        "valid_zoom_rate": None,
        "event_coverage": 0.7,
        "seeds": {"0": run, "1": run},
        "paper": {"zooms": 2, "accuracy": {"longvideoreason/accuracy": 80.3}},
        **changes,
    }


def make_ablation() -> dict[str, object]:
    claim = {
        "metric": "accuracy",
        "greater": "full",
        "lesser": "without_tool_reward",
        "difference": {"mean": 0.031, "low": -0.004, "high": 0.06, "count": 2000},
        "seeds": {"0": 0.05, "1": 0.012},
        "questions": 1000,
        "status": "inconclusive",
    }
    return {
        "seeds": [0, 1],
        "questions": 1000,
        "videos": 250,
        "interval_level": 0.95,
        "paper": "a paper <7B>",
        "variants": {"full": make_variant(), "without_tool_reward": make_variant(zooms=None)},
        "claims": [claim],
        "order_holds": False,
    }


def test_page_shows_metrics_differences_and_training(tmp_path: Path) -> None:
    (tmp_path / "ablation.json").write_text(json.dumps(make_ablation()))
    for seed in (0, 1):
        (tmp_path / f"seed{seed}/full").mkdir(parents=True)
        with MetricLogger(tmp_path / f"seed{seed}/full/metrics.jsonl") as log:
            for step in range(3):
                log.log(
                    step,
                    {metric_names.REWARD_ACCURACY: 0.4 + 0.2 * seed, metric_names.ZOOMS_PER_EPISODE: 1.0},
                )
    page = write_ablation_report(tmp_path).read_text()
    for text in (
        "+3.1",
        "-0.4 to +6.0",
        "+5.0 / +1.2",
        "inconclusive",
        "order is not fully supported",
        "80.3",
    ):
        assert text in page
    assert "a paper &lt;7B&gt;" in page
    # The mean of the seeds.
    assert "Full: 50.0% at 0" in page
    assert page.count("<svg") == 2


def test_variants_have_distinct_colors() -> None:
    assert set(VARIANT_COLORS) == set(VARIANTS)
    assert len(set(VARIANT_COLORS.values())) == len(VARIANTS)


def test_missing_ablation_raises_and_empty_one_renders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no ablation at"):
        write_ablation_report(tmp_path)
    empty = {**make_ablation(), "variants": {}, "claims": [], "seeds": []}
    (tmp_path / "ablation.json").write_text(json.dumps(empty))
    assert "No evaluation has finished yet" in write_ablation_report(tmp_path).read_text()
