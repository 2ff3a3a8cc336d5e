"""Dashboards and alert rules: valid queries over exported metrics."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.promql import metric_names_in
from vz_ray.monitoring.metric_catalog import METRIC_CATALOG
from vz_ray.serve.metrics import ServeMetrics

RAY = json.loads((Path(__file__).parent / "ray_metrics.json").read_text())
"""Metric names scraped from a real Ray, and its version."""
GRAFANA = Path(__file__).resolve().parents[2] / "cluster" / "grafana"
DASHBOARDS = sorted(GRAFANA.glob("*.json"))


def serve_series_names() -> set[str]:
    """Series exported by `serve/metrics.py`."""
    families = ServeMetrics().registry.collect()
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return {f"{family.name}{suffix}" for family in families for suffix in suffixes[family.type]}


def gpu_series_names() -> set[str]:
    """Series that Ray exports on nodes with GPUs only."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    return {f"ray_{name}" for name in METRICS_GAUGES if name.startswith(("node_gpus_", "node_gram_"))}


def exported_series() -> set[str]:
    run_series = {name for metric in METRIC_CATALOG.values() for name in metric.series_names}
    return run_series | serve_series_names() | set(RAY["names"]) | gpu_series_names()


def queries() -> list[tuple[str, str]]:
    """Location and PromQL of every dashboard panel and alert rule."""
    collected = []
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            collected += [(f"{path.stem}: {panel['title']}", target["expr"]) for target in panel["targets"]]
    rules = yaml.safe_load((GRAFANA / "alerts.yaml").read_text())["groups"][0]["rules"]
    return collected + [(rule["alert"], rule["expr"]) for rule in rules]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_have_unique_ids_and_descriptions(path: Path):
    board = json.loads(path.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    titles = [panel["title"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) > 0
    assert len(set(titles)) == len(titles)
    positions = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]}
    assert len(positions) == len(ids)
    for panel in board["panels"]:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]
    names = [variable["name"] for variable in board["templating"]["list"]]
    assert names[0] == "datasource"
    uses_run = any("$run" in target["expr"] for panel in board["panels"] for target in panel["targets"])
    assert uses_run == ("run" in names)


def test_dashboards_have_unique_ids():
    uids = [json.loads(path.read_text())["uid"] for path in DASHBOARDS]
    assert len(set(uids)) == len(uids)


@pytest.mark.parametrize(("location", "query"), queries(), ids=lambda value: value[:40])
def test_query_reads_exported_metrics_only(location: str, query: str):
    read = metric_names_in(query)
    assert read or query == "time()"
    assert read <= exported_series(), f"{location} reads {read - exported_series()}"


def test_every_catalog_metric_is_on_a_dashboard_or_alert():
    read = set().union(*(metric_names_in(query) for _, query in queries()))
    unused = [metric.name for metric in METRIC_CATALOG.values() if not read & set(metric.series_names)]
    # Shown by `vz-ray top` or meant for ad hoc queries.
    assert set(unused) <= {
        "vz_answered_ratio", "vz_mismatch_logprob_max_nats", "vz_weight_version", "vz_learner_seconds",
        "vz_step_tokens_per_second", "vz_preempted_turns",
    }  # fmt: skip


@pytest.mark.parametrize(
    "query",
    ["sum(a", "sum by (run) (a[5])", "summe(a)", "a}", "a{x='1'", "a ? b"],
)
def test_invalid_promql_is_rejected(query: str):
    with pytest.raises(ValueError, match=r"never closed|not a range|not a function|closes nothing|not PromQL"):
        metric_names_in(query)


def test_metric_names_exclude_labels_and_functions():
    query = 'sum by (run) (rate(a_total{x=~"y"}[5m])) > 0.2 * max by (le, run) (b) and on (run) c == 1'
    assert metric_names_in(query) == {"a_total", "b", "c"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_accepts_alert_rules(tmp_path: Path):
    checked = subprocess.run(
        ["promtool", "check", "rules", str(GRAFANA / "alerts.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


CASES = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'ray_vz_mismatch_kl_nats{{run="bad"}}', values: '0.03x5'}}
      - {{series: 'ray_vz_mismatch_kl_nats{{run="good"}}', values: '0.001x5'}}
      - {{series: 'ray_vz_mismatch_kl_limit_nats{{run="bad"}}', values: '0.05x5'}}
      - {{series: 'ray_vz_mismatch_kl_limit_nats{{run="good"}}', values: '0.05x5'}}
    alert_rule_test:
      - eval_time: 4m
        alertname: VzRayMismatchHigh
        exp_alerts: [{{exp_labels: {{run: bad, severity: warning}}, exp_annotations: {{}}}}]
  - interval: 1m
    input_series:
      - {{series: 'ray_vz_last_step_timestamp_seconds{{run="stuck"}}', values: '0x60'}}
      - {{series: 'ray_vz_phase_seconds{{run="stuck", phase="rollout"}}', values: '60x60'}}
      - {{series: 'ray_vz_step{{run="stuck"}}', values: '3x60'}}
      - {{series: 'ray_vz_max_steps{{run="stuck"}}', values: '9x60'}}
      - {{series: 'ray_vz_last_step_timestamp_seconds{{run="over"}}', values: '0x60'}}
      - {{series: 'ray_vz_phase_seconds{{run="over", phase="rollout"}}', values: '60x60'}}
      - {{series: 'ray_vz_step{{run="over"}}', values: '9x60'}}
      - {{series: 'ray_vz_max_steps{{run="over"}}', values: '9x60'}}
    alert_rule_test:
      - {{eval_time: 10m, alertname: VzRayNoProgress, exp_alerts: []}}
      - eval_time: 20m
        alertname: VzRayNoProgress
        exp_alerts: [{{exp_labels: {{run: stuck, severity: warning}}, exp_annotations: {{}}}}]
  - interval: 1m
    input_series:
      - {{series: 'ray_vz_last_step_timestamp_seconds{{run="first"}}', values: '0x90'}}
      - {{series: 'ray_vz_step{{run="first"}}', values: '0x90'}}
      - {{series: 'ray_vz_max_steps{{run="first"}}', values: '9x90'}}
    alert_rule_test:
      - {{eval_time: 55m, alertname: VzRayNoProgress, exp_alerts: []}}
      - eval_time: 65m
        alertname: VzRayNoProgress
        exp_alerts: [{{exp_labels: {{run: first, severity: warning}}, exp_annotations: {{}}}}]
  - interval: 1m
    input_series:
      - {{series: 'ray_vz_heartbeat_timestamp_seconds{{run="dead"}}', values: '0 60 120 stale'}}
      - {{series: 'ray_vz_step{{run="dead"}}', values: '3 3 3 stale'}}
      - {{series: 'ray_vz_max_steps{{run="dead"}}', values: '9 9 9 stale'}}
    alert_rule_test:
      - {{eval_time: 3m, alertname: VzRayDriverHeartbeatMissing, exp_alerts: []}}
      - eval_time: 6m
        alertname: VzRayDriverHeartbeatMissing
        exp_alerts: [{{exp_labels: {{run: dead, severity: critical}}, exp_annotations: {{}}}}]
  - interval: 1m
    input_series:
      - {{series: 'ray_vz_workers{{run="a", state="ready"}}', values: '0x9'}}
      - {{series: 'ray_vz_workers{{run="a", state="starting"}}', values: '1x9'}}
      - {{series: 'ray_vz_episodes_waiting{{run="a"}}', values: '8x9'}}
      - {{series: 'ray_vz_episodes_running{{run="a"}}', values: '0x9'}}
      - {{series: 'ray_vz_decode_failures_total{{run="a", kind="lost"}}', values: '0 2 4 6 6 6 6 6 6 6'}}
      - {{series: 'ray_vz_lost_workers_total{{run="a"}}', values: '0 2 4 6 6 6 6 6 6 6'}}
      - {{series: 'ray_vz_episodes_total{{run="a", status="failed"}}', values: '0+5x9'}}
      - {{series: 'ray_vz_episodes_total{{run="a", status="answered"}}', values: '0+5x9'}}
    alert_rule_test:
      - eval_time: 5m
        alertname: VzRayNoWorkers
        exp_alerts: [{{exp_labels: {{run: a, severity: critical}}, exp_annotations: {{}}}}]
      - eval_time: 9m
        alertname: VzRayDecodersDying
        exp_alerts: [{{exp_labels: {{run: a, severity: warning}}, exp_annotations: {{}}}}]
      - eval_time: 9m
        alertname: VzRayWorkersDying
        exp_alerts: [{{exp_labels: {{run: a, severity: warning}}, exp_annotations: {{}}}}]
      - eval_time: 9m
        alertname: VzRayEpisodesFail
        exp_alerts: [{{exp_labels: {{run: a, severity: warning}}, exp_annotations: {{}}}}]
  - interval: 1h
    input_series:
      - {{series: 'ray_vz_last_checkpoint_timestamp_seconds{{run="a"}}', values: '0x6'}}
      - {{series: 'ray_vz_step{{run="a"}}', values: '3x6'}}
      - {{series: 'ray_vz_max_steps{{run="a"}}', values: '9x6'}}
    alert_rule_test:
      - {{eval_time: 2h, alertname: VzRayCheckpointTooOld, exp_alerts: []}}
      - eval_time: 4h
        alertname: VzRayCheckpointTooOld
        exp_alerts: [{{exp_labels: {{run: a, severity: warning}}, exp_annotations: {{}}}}]
"""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_alerts_fire_only_when_expected(tmp_path: Path):
    rules = yaml.safe_load((GRAFANA / "alerts.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        assert set(rule["annotations"]) == {"summary", "description"}
        rule["annotations"] = {}  # the texts contain values and are not under test
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "cases.yaml").write_text(CASES.format(rules=tmp_path / "rules.yaml"))
    tested = subprocess.run(
        ["promtool", "test", "rules", str(tmp_path / "cases.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    alert_names = {rule["alert"] for rule in rules["groups"][0]["rules"]}
    assert all(name in CASES for name in alert_names)


@pytest.mark.slow
def test_ray_exports_the_listed_metrics(ray_session: None):
    import ray

    assert ray.__version__.split(".")[:2] == RAY["ray"].split(".")[:2], (
        "scrape the new Ray version and update ray_metrics.json"
    )

    @ray.remote(num_cpus=0.1)
    class Probe:
        def ping(self) -> None:
            pass

    actor = Probe.remote()
    ray.get(actor.ping.remote())
    (node,) = ray.nodes()
    required = set().union(*(metric_names_in(query) for _, query in queries())) & set(RAY["names"])
    deadline, exported = time.monotonic() + 60, set[str]()
    while required - exported and time.monotonic() < deadline:
        time.sleep(1)
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            text = urllib.request.urlopen(url, timeout=5).read().decode()
        except OSError:
            continue
        exported |= {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[:1] not in "#"}
    missing = sorted(required - exported)
    assert not missing
