"""Monitoring of a server: JSON log lines and decoder metrics."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.live_server import LiveServer, live_server, tiny_serve_config
from vz_ray.runtime.monitor_run import prometheus_targets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

METRICS_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("observed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        with live_server(
            tiny_serve_config(folder, **{"monitoring.log_format": "json", "name": "watcher"}), folder
        ) as running:
            answer = running.ask("{zoom 2 4 2} {answer B}", model="watcher").choices[0].message
            assert answer.content == "B"
            yield running


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Parse a log file with one JSON object per line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_logs_have_run_worker_and_request(server: LiveServer) -> None:
    ingress, agent = (
        lines
        for kind in ("Ingress", "Agent")
        for path in (server.folder / "logs").glob(f"replica_vz_ray_{kind}_*.log")
        if (lines := lines_of(path))
    )
    for lines in (ingress, agent):
        ours = [line for line in lines if line.get("logger", "").startswith("vz_ray.")]
        assert ours
        assert {line["run"] for line in ours} == {"watcher"}
        assert len({line["worker"] for line in ours}) == 1
    [answered] = [line for line in ingress if " after " in line.get("message", "")]
    assert answered["message"].startswith(f"Completed request {answered['request']}: answered after")
    assert any("Serving version 1" in line.get("message", "") for line in agent)


def test_decoder_metrics_have_the_server_name(server: LiveServer) -> None:
    [address] = prometheus_targets()
    samples: set[tuple[str, str]] = set()
    end_time = time.monotonic() + METRICS_TIMEOUT_S
    while ("watcher", "zoom") not in samples:
        assert time.monotonic() < end_time, samples
        time.sleep(0.5)
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        samples = {
            (sample.labels["run"], sample.labels["kind"])
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "ray_vz_decode_seconds_count"
        }
    assert {run for run, _ in samples} == {"watcher"}
