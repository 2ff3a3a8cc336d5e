"""Dashboards and alerts read only what is exported, and parse."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from cluster.grafana.make import DASHBOARDS, HERE, dashboard
from tests.promql import metric_names_in
from vz_ray.monitoring.metric_catalog import METRIC_CATALOG, all_series_names
from vz_ray.serve.metrics import ServeMetrics

RAY = json.loads((Path(__file__).parent / "ray_metrics.json").read_text())
"""Names that a real Ray was scraped for, and its version."""
FILES = sorted(HERE.glob("*.json"))


def served_names() -> set[str]:
    """What `serve/measures.py` exports."""
    families = ServeMetrics().registry.collect()
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return {f"{family.name}{suffix}" for family in families for suffix in suffixes[family.type]}


def known() -> set[str]:
    return all_series_names() | served_names() | set(RAY["names"])


def queries() -> list[tuple[str, str]]:
    """Where it stands, and the query, of every panel and every rule."""
    found = []
    for path in FILES:
        for panel in json.loads(path.read_text())["panels"]:
            found += [(f"{path.stem}: {panel['title']}", target["expr"]) for target in panel["targets"]]
    rules = yaml.safe_load((HERE / "alerts.yaml").read_text())["groups"][0]["rules"]
    return found + [(rule["alert"], rule["expr"]) for rule in rules]


def test_files_are_what_the_tables_make():
    assert {path.stem for path in FILES} == set(DASHBOARDS)
    for path in FILES:
        title, panels, of_runs = DASHBOARDS[path.stem]
        assert json.loads(path.read_text()) == dashboard(path.stem, title, panels, of_runs), (
            "run `python -m cluster.grafana.make`"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels_have_ids_of_their_own_and_say_what_they_show(path: Path):
    board = json.loads(path.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    titles = [panel["title"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) > 0
    assert len(set(titles)) == len(titles)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]}
    assert len(places) == len(ids)
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


def test_dashboards_have_ids_of_their_own():
    uids = [json.loads(path.read_text())["uid"] for path in FILES]
    assert len(set(uids)) == len(uids)


@pytest.mark.parametrize(("where", "query"), queries(), ids=lambda value: value[:40])
def test_a_query_parses_and_reads_only_what_is_exported(where: str, query: str):
    read = metric_names_in(query)
    assert read or query == "time()"
    assert read <= known(), f"{where} reads {read - known()}"


def test_every_metric_of_the_catalogue_is_on_some_dashboard_or_in_an_alert():
    read = set().union(*(metric_names_in(query) for _, query in queries()))
    unseen = [metric.name for metric in METRIC_CATALOG.values() if not read & set(metric.series_names)]
    # Seen on the screen of `vz-ray top` or of use by hand.
    assert set(unseen) <= {
        "vz_answered_ratio", "vz_mismatch_logprob_max_nats", "vz_weight_version", "vz_learner_seconds",
        "vz_step_tokens_per_second", "vz_preempted_turns",
    }  # fmt: skip


@pytest.mark.parametrize(
    "query",
    ["sum(a", "sum by (run) (a[5])", "summe(a)", "a}", "a{x='1'", "a ? b"],
)
def test_what_is_no_promql_is_found(query: str):
    with pytest.raises(ValueError, match=r"never closed|no range|no function|closes nothing|not PromQL"):
        metric_names_in(query)


def test_metrics_are_told_from_labels_and_functions():
    query = 'sum by (run) (rate(a_total{x=~"y"}[5m])) > 0.2 * max by (le, run) (b) and on (run) c == 1'
    assert metric_names_in(query) == {"a_total", "b", "c"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_prometheus_takes_the_alerts(tmp_path: Path):
    checked = subprocess.run(
        ["promtool", "check", "rules", str(HERE / "alerts.yaml")], capture_output=True, text=True, timeout=60
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
      - {{series: 'ray_vz_progress_timestamp_seconds{{run="stuck"}}', values: '0x60'}}
      - {{series: 'ray_vz_phase_seconds{{run="stuck", phase="rollout"}}', values: '60x60'}}
      - {{series: 'ray_vz_iteration{{run="stuck"}}', values: '3x60'}}
      - {{series: 'ray_vz_iterations{{run="stuck"}}', values: '9x60'}}
      - {{series: 'ray_vz_progress_timestamp_seconds{{run="over"}}', values: '0x60'}}
      - {{series: 'ray_vz_phase_seconds{{run="over", phase="rollout"}}', values: '60x60'}}
      - {{series: 'ray_vz_iteration{{run="over"}}', values: '9x60'}}
      - {{series: 'ray_vz_iterations{{run="over"}}', values: '9x60'}}
    alert_rule_test:
      - {{eval_time: 10m, alertname: VzRayNoProgress, exp_alerts: []}}
      - eval_time: 20m
        alertname: VzRayNoProgress
        exp_alerts: [{{exp_labels: {{run: stuck, severity: warning}}, exp_annotations: {{}}}}]
  - interval: 1m
    input_series:
      - {{series: 'ray_vz_heartbeat_timestamp_seconds{{run="dead"}}', values: '0 60 120 stale'}}
      - {{series: 'ray_vz_iteration{{run="dead"}}', values: '3 3 3 stale'}}
      - {{series: 'ray_vz_iterations{{run="dead"}}', values: '9 9 9 stale'}}
    alert_rule_test:
      - {{eval_time: 3m, alertname: VzRayDriverSilent, exp_alerts: []}}
      - eval_time: 6m
        alertname: VzRayDriverSilent
        exp_alerts: [{{exp_labels: {{run: dead, severity: critical}}, exp_annotations: {{}}}}]
  - interval: 1m
    input_series:
      - {{series: 'ray_vz_workers{{run="a", state="ready"}}', values: '0x9'}}
      - {{series: 'ray_vz_workers{{run="a", state="starting"}}', values: '1x9'}}
      - {{series: 'ray_vz_episodes_waiting{{run="a"}}', values: '8x9'}}
      - {{series: 'ray_vz_episodes_playing{{run="a"}}', values: '0x9'}}
      - {{series: 'ray_vz_clip_failures_total{{run="a", kind="lost"}}', values: '0 2 4 6 6 6 6 6 6 6'}}
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
      - {{series: 'ray_vz_checkpoint_timestamp_seconds{{run="a"}}', values: '0x6'}}
      - {{series: 'ray_vz_iteration{{run="a"}}', values: '3x6'}}
      - {{series: 'ray_vz_iterations{{run="a"}}', values: '9x6'}}
    alert_rule_test:
      - {{eval_time: 2h, alertname: VzRayCheckpointTooOld, exp_alerts: []}}
      - eval_time: 4h
        alertname: VzRayCheckpointTooOld
        exp_alerts: [{{exp_labels: {{run: a, severity: warning}}, exp_annotations: {{}}}}]
"""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path):
    rules = yaml.safe_load((HERE / "alerts.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        assert set(rule["annotations"]) == {"summary", "description"}
        rule["annotations"] = {}  # their texts hold the values, and are not what is tested
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "cases.yaml").write_text(CASES.format(rules=tmp_path / "rules.yaml"))
    tested = subprocess.run(
        ["promtool", "test", "rules", str(tmp_path / "cases.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    named = {rule["alert"] for rule in rules["groups"][0]["rules"]}
    assert all(name in CASES for name in named)


@pytest.mark.slow
def test_the_list_of_rays_own_metrics_is_what_a_ray_exports(ray_session: None):
    import ray

    assert ray.__version__.split(".")[:2] == RAY["ray"].split(".")[:2], (
        "scrape the new Ray and renew the list"
    )

    @ray.remote(num_cpus=0.1)
    class Some:
        def there(self) -> None:
            pass

    actor = Some.remote()
    ray.get(actor.there.remote())
    (node,) = ray.nodes()
    wanted = set().union(*(metric_names_in(query) for _, query in queries())) & set(RAY["names"])
    until, found = time.monotonic() + 60, set[str]()
    while wanted - found and time.monotonic() < until:
        time.sleep(1)
        where = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            text = urllib.request.urlopen(where, timeout=5).read().decode()
        except OSError:
            continue
        found |= {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[:1] not in "#"}
    missing = sorted(wanted - found)
    assert not missing
