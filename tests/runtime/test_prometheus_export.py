"""Metrics, traces and logs of a real training run, scraped over HTTP."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.small_run import ROOT, SmallRun, wait_for_exit, wait_until
from tests.trace_collector import TraceCollector, collect_traces
from vz_ray.monitoring.metric_catalog import METRIC_CATALOG

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RUN = "seen"
Samples = dict[str, list[tuple[dict[str, str], float]]]
"""Labels and values by series name."""


def scrape(address: str) -> Samples:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        text = response.read().decode()
    samples: Samples = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples[sample.name].append((sample.labels, sample.value))
    return samples


@pytest.fixture(scope="module")
def collector() -> Iterator[TraceCollector]:
    with collect_traces() as collector:
        yield collector


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory, collector: TraceCollector):
    """Last scraped value of each series of a run, and the run directory."""
    small = SmallRun.create(tmp_path_factory.mktemp("scraped"))
    command = [
        *(sys.executable, "-m", "vz_ray.cli", "train", "conf/laptop.yaml", *small.overrides()),
        f"name={RUN}",
        "train.max_steps=8",
        "monitoring.poll_interval_s=1",
        "monitoring.log_format=json",
        f"monitoring.otlp_endpoint={collector.url}",
        "monitoring.trace_sample_ratio=1",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "RAY_metrics_report_interval_ms": "500"},
    )
    run = small.runs / RUN
    targets = run / "prometheus_targets.json"
    wait_until(targets.exists, process)
    (target_group,) = json.loads(targets.read_text())
    (address,) = target_group["targets"]
    samples: Samples = {}

    def scrape_until_exit() -> bool:
        # The endpoint may not be up yet, or no longer.
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            samples.update(scrape(address))
        return process.poll() is not None

    poll_until(scrape_until_exit, process)
    result = wait_for_exit(process)
    assert result.returncode == 0, result.stderr
    return samples, run


def poll_until(condition, process) -> None:
    deadline = time.monotonic() + 250
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"the run did not end: {wait_for_exit(process, 1)}")
        time.sleep(0.3)


def values(scraped: Samples, name: str, **labels: str) -> list[float]:
    return [
        value
        for series_labels, value in scraped.get(name, [])
        if labels.items() <= series_labels.items() and series_labels["run"] == RUN
    ]


def test_every_catalog_metric_is_exported_with_its_labels(scraped):
    samples, run = scraped
    reported = {key for line in (run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    # Gauges of the teacher, of failed episodes and the like have no value in this run.
    expected = [
        metric
        for metric in METRIC_CATALOG.values()
        if not metric.key or any(key.startswith(metric.key) for key in reported)
    ]
    missing = {name for metric in expected for name in metric.series_names} - set(samples)
    assert not missing
    for metric in expected:
        for name in metric.series_names:
            for labels, value in samples[name]:
                assert set(metric.labels) <= set(labels), name
                assert labels["run"] == RUN
                assert not math.isnan(value), (name, labels)


def test_exported_values_match_the_metrics_file(scraped):
    samples, run = scraped
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert values(samples, "ray_vz_max_steps") == [8]
    done = int(values(samples, "ray_vz_step")[0])
    assert 1 <= done <= 8
    # Gauges of two steps may mix: Ray may export them while they are being set.
    exported = {
        "weight_sync/version": values(samples, "ray_vz_weight_version"),
        "weight_sync/seconds": values(samples, "ray_vz_weight_sync_seconds"),
        "learner/seconds": values(samples, "ray_vz_learner_seconds"),
        "time/rollout_seconds": values(samples, "ray_vz_phase_seconds", phase="rollout"),
        **{
            f"reward/{part}": values(samples, "ray_vz_reward", part=part)
            for part in ("total", "accuracy", "format", "tool")
        },
    }
    for key, (value,) in exported.items():
        assert any(value == pytest.approx(row[key]) for row in rows), (key, value)
    assert values(samples, "ray_vz_mismatch_kl_nats")[0] < values(samples, "ray_vz_mismatch_kl_limit_nats")[0]
    assert sum(values(samples, "ray_vz_workers")) == 1
    assert values(samples, "ray_vz_workers", state="dead") == [0]
    episodes = sum(values(samples, "ray_vz_episodes_total"))
    assert 4 <= episodes <= 32
    assert episodes % 1 == 0
    assert values(samples, "ray_vz_sampled_tokens_total")[0] <= 24 * 6 * episodes
    assert values(samples, "ray_vz_groups_total", outcome="dropped") == [0]
    assert 50e6 < values(samples, "ray_vz_driver_memory_bytes")[0] < 20e9
    assert sum(values(samples, "ray_vz_decoders", state="responsive")) == 1
    assert sum(values(samples, "ray_vz_decode_seconds_count", kind="overview")) >= 4
    assert sum(values(samples, "ray_vz_decode_frames_total")) > 0
    # No phase is active after the end.
    assert sum(values(samples, "ray_vz_phase")) in (0, 1)
    assert sum(values(samples, "ray_vz_clip_wait_seconds_count", kind="overview")) == episodes
    assert values(samples, "ray_vz_dropped_records_total", sink="otlp") == [0]


def test_live_status_reports_the_end_of_the_run(scraped):
    _, run = scraped
    status = json.loads((run / "live.json").read_text())
    assert (status["state"], status["step"], status["max_steps"], status["error"]) == ("ended", 8, 8, "")
    assert status["checkpoint"]["step"] == 8
    assert status["rollout"]["workers"] == {"ready": 1}


def test_json_log_lines_name_the_run(scraped):
    _, run = scraped
    lines = [json.loads(line) for line in Path(run / "logs" / "vz_ray.log").read_text().splitlines()]
    assert lines
    assert {line["run"] for line in lines} == {RUN}


def test_every_step_and_episode_has_a_trace(scraped, collector: TraceCollector):
    _, run = scraped
    roots = [span for span in collector.spans if span.parent_span_id == b""]
    steps = [span for span in roots if span.name == "step"]
    episodes = [span for span in roots if span.name == "episode"]
    assert (len(steps), len(episodes)) == (8, 32)
    assert len({span.trace_id for span in roots}) == 40
    traced = {a.value.string_value for span in episodes for a in span.attributes if a.key == "vz.episode"}
    logged = [json.loads(line) for path in (run / "episodes").glob("*.jsonl") for line in path.open()]
    assert len(traced) == len(logged) == 32
    for span in collector.spans:
        assert span.start_time_unix_nano <= span.end_time_unix_nano
    first_step = [span for span in collector.spans if span.parent_span_id == steps[0].span_id]
    assert {span.name for span in first_step} == {"rollout", "learn", "publish", "checkpoint"}
    assert {"overview", "turn 0", "generate", "reward"} <= {span.name for span in collector.spans}
