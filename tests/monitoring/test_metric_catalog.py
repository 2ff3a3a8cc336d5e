"""Metric catalog: naming rules, documentation, and rows of `metrics.jsonl`."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from vz_ray.config.monitoring import MonitoringConfig
from vz_ray.monitoring import metric_catalog, metric_names
from vz_ray.monitoring.metric_catalog import METRIC_CATALOG, metrics_from_row
from vz_ray.runtime.run_monitor import RunMonitor

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs/monitoring.md"


def test_names_and_labels_follow_prometheus_rules():
    for metric in METRIC_CATALOG.values():
        assert re.fullmatch(r"vz_[a-z][a-z_]*[a-z]", metric.name)
        assert metric.kind in ("gauge", "counter", "histogram")
        assert metric.help.endswith(".")
        assert metric.labels[0] == "run"
        assert not {"episode", "task", "step", "video"} & set(metric.labels), "labels must be bounded"
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(metric.buckets)
        assert not metric.name.endswith("_total"), "Ray adds the suffix"


def test_names_are_unique():
    assert len(METRIC_CATALOG) == len(metric_catalog._LIVE_METRICS) + len(metric_catalog._STEP_METRICS)


def test_every_metric_name_is_exported():
    """Except prefixes, and counts that live metrics report more often."""
    exempt = {"STEP", "WORKERS", "LEARNER_PREFIX", "STALENESS_PREFIX"}
    names = {name: value for name, value in vars(metric_names).items() if name.isupper() and isinstance(value, str)}
    assert exempt <= names.keys()
    keys = tuple(metric.key for metric in METRIC_CATALOG.values() if metric.key)
    prefixes = tuple(key for key in keys if key.endswith("/"))
    missing = {value for name, value in names.items() if name not in exempt and value not in keys}
    assert {value for value in missing if not value.startswith(prefixes)} == set()


def test_row_becomes_labeled_metrics():
    row = {
        "step": 3.0,
        metric_names.REWARD_TOOL: 0.25,
        "reward/length": -1.0,
        "time/rollout_seconds": 12.0,
        metric_names.DRIVER_MEMORY: 3e8,
        "groups/kept": 9.0,
        metric_names.MISMATCH_KL: 0.01,
    }
    metrics = [(metric.name, labels, value) for metric, labels, value in metrics_from_row(row)]
    assert metrics == [
        ("vz_reward", {"part": "tool"}, 0.25),
        ("vz_reward", {"part": "length"}, -1.0),
        ("vz_mismatch_kl_nats", {}, 0.01),
        ("vz_phase_seconds", {"phase": "rollout"}, 12.0),
        ("vz_driver_memory_bytes", {}, 3e8),
    ]


def catalog_table() -> str:
    """Return the catalog as the Markdown table of the documentation."""
    lines = [
        "| series | kind | unit | labels | description | key of `metrics.jsonl` |",
        "|---|---|---|---|---|---|",
    ]
    for metric in METRIC_CATALOG.values():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        key = f"`{metric.key}{'*' if metric.key.endswith('/') else ''}`" if metric.key else ""
        series = metric.series_names[0]
        lines.append(f"| `{series}` | {metric.kind} | {metric.unit} | {labels} | {metric.help} | {key} |")
    return "\n".join(lines) + "\n"


def test_documentation_has_the_current_table():
    assert catalog_table() in DOCS.read_text(), f"the table of {DOCS} must be:\n{catalog_table()}"


def test_documentation_names_every_setting_and_alert():
    text = DOCS.read_text()
    alerts = yaml.safe_load((ROOT / "cluster/grafana/alerts.yaml").read_text())["groups"][0]["rules"]
    for name in [f"monitoring.{field.name}" for field in fields(MonitoringConfig)] + [rule["alert"] for rule in alerts]:
        assert name in text, name


@pytest.mark.parametrize("metric", METRIC_CATALOG.values(), ids=lambda metric: metric.name)
def test_series_names_match_the_kind(metric):
    suffixes = {"gauge": [""], "counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}[metric.kind]
    assert metric.series_names == tuple(f"ray_{metric.name}{suffix}" for suffix in suffixes)


def test_run_monitor_uses_catalog_names():
    calls = []

    class Recorder:
        def set(self, name, value, **labels):
            calls.append((name, "gauge", labels))

        def add(self, name, amount, **labels):
            calls.append((name, "counter", labels))

        def observe(self, name, value, **labels):
            calls.append((name, "histogram", labels))

    monitor = RunMonitor("a", Recorder())
    monitor.on_start(0, 3, 0.05)
    monitor.on_rl_step(0, {"reward/total": 1.0}, 2, 1)
    assert calls
    for name, kind, labels in calls:
        assert METRIC_CATALOG[name].kind == kind
        assert set(METRIC_CATALOG[name].labels) == {"run", *labels}
