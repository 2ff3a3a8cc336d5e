from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from vz_ray.config.monitoring import MonitoringConfig
from vz_ray.monitoring import metric_catalog, metric_names
from vz_ray.monitoring.metric_catalog import METRIC_CATALOG, catalog_table, metrics_from_row
from vz_ray.runtime.run_monitor import RunMonitor

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs/observability.md"


def test_names_and_labels_are_prometheus_own():
    for metric in METRIC_CATALOG.values():
        assert re.fullmatch(r"vz_[a-z][a-z_]*[a-z]", metric.name)
        assert metric.kind in ("gauge", "counter", "histogram")
        assert metric.help.endswith(".")
        assert metric.labels[0] == "run"
        assert not {"episode", "task", "iteration", "video"} & set(metric.labels), "labels must be bounded"
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(metric.buckets)
        assert not metric.name.endswith("_total"), "Ray adds it"


def test_no_name_is_given_twice():
    assert len(METRIC_CATALOG) == len(metric_catalog._LIVE) + len(metric_catalog._OF_ITERATIONS)


def test_a_row_becomes_metrics_with_labels_and_in_base_units():
    row = {
        "step": 3.0,
        metric_names.REWARD_TOOL: 0.25,
        "reward/length": -1.0,
        "time/rollout_seconds": 12.0,
        metric_names.DRIVER_MEMORY: 300.0,
        "mismatch/kl_after_image": 9.0,
        metric_names.MISMATCH_KL: 0.01,
    }
    found = [(metric.name, labels, value) for metric, labels, value in metrics_from_row(row)]
    assert found == [
        ("vz_reward", {"part": "tool"}, 0.25),
        ("vz_reward", {"part": "length"}, -1.0),
        ("vz_mismatch_kl_nats", {}, 0.01),
        ("vz_phase_seconds", {"phase": "rollout"}, 12.0),
        ("vz_driver_memory_bytes", {}, 3e8),
    ]


def test_the_documentation_has_the_table_as_it_is():
    assert catalog_table() in DOCS.read_text(), (
        "put the output of vz_ray.monitoring.metric_catalog.catalog_table() there"
    )


def test_the_documentation_names_every_setting_and_every_alert():
    text = DOCS.read_text()
    alerts = yaml.safe_load((ROOT / "cluster/grafana/alerts.yaml").read_text())["groups"][0]["rules"]
    for name in [f"observe.{field.name}" for field in fields(MonitoringConfig)] + [
        rule["alert"] for rule in alerts
    ]:
        assert name in text, name


def test_the_table_has_a_line_for_each():
    lines = catalog_table().splitlines()
    assert len(lines) == 2 + len(METRIC_CATALOG)
    assert all(line.count("|") == 7 for line in lines)


@pytest.mark.parametrize("metric", METRIC_CATALOG.values(), ids=lambda metric: metric.name)
def test_each_is_scraped_under_names_of_its_kind(metric):
    ends = {"gauge": [""], "counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}[metric.kind]
    assert metric.scraped == tuple(f"ray_{metric.name}{end}" for end in ends)


def test_a_watch_that_tells_nobody_knows_the_names():
    """Names that the catalogue lacks would be found here, as the watch asks for each by name."""
    asked = []

    class Meters:
        def set(self, name, value, **labels):
            asked.append((name, "gauge", labels))

        def add(self, name, amount, **labels):
            asked.append((name, "counter", labels))

        def observe(self, name, value, **labels):
            asked.append((name, "histogram", labels))

    watch = RunMonitor("a", Meters())
    watch.on_start(0, 3, 0.05)
    watch.on_rl_step(0, {"reward/total": 1.0}, 2, 1)
    assert asked
    for name, kind, labels in asked:
        assert METRIC_CATALOG[name].kind == kind
        assert set(METRIC_CATALOG[name].labels) == {"run", *labels}
