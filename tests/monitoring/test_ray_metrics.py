"""RayMetrics never raises. The export itself is tested in tests/runtime/test_prometheus_export.py."""

from __future__ import annotations

import logging

import pytest

from vz_ray.monitoring import ray_metrics
from vz_ray.monitoring.ray_metrics import RayMetrics


def test_metrics_are_ignored_outside_ray(monkeypatch):
    monkeypatch.setattr(ray_metrics.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_metrics, "_create_instrument", lambda metric: pytest.fail("instrument created"))
    RayMetrics("agent").set("vz_step", 1)


def test_export_error_is_logged_once(monkeypatch, caplog):
    def broken(metric):
        raise ConnectionError("no agent")

    monkeypatch.setattr(ray_metrics.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_metrics, "_create_instrument", broken)
    metrics = RayMetrics("agent")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            metrics.observe("vz_decode_seconds", 1.0, kind="zoom")
    assert [record.message for record in caplog.records] == [
        "Metric export failed: vz_decode_seconds: ConnectionError: no agent"
    ]


def test_unknown_metric_name_raises():
    with pytest.raises(KeyError):
        RayMetrics("agent").set("vz_moon", 1.0)


def test_adding_zero_creates_the_counter(monkeypatch):
    calls = []

    class Counter:
        def inc(self, value, tags):
            calls.append(("inc", value, tags))

        def _record(self, value, tags):
            calls.append(("_record", value, tags))

    monkeypatch.setattr(ray_metrics.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_metrics, "_create_instrument", lambda metric: Counter())
    metrics = RayMetrics("agent")
    metrics.add("vz_groups", 0, outcome="kept")
    metrics.add("vz_groups", 2, outcome="kept")
    tags = {"run": "agent", "outcome": "kept"}
    assert calls == [("_record", 0.0, tags), ("inc", 2, tags)]
