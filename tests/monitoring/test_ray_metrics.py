"""Whoever measures is not disturbed by it; that Ray exports what is measured is tested in tests/watch."""

from __future__ import annotations

import logging

import pytest

from vz_ray.monitoring import ray_metrics
from vz_ray.monitoring.ray_metrics import RayMetrics


def test_outside_ray_nothing_happens(monkeypatch):
    monkeypatch.setattr(ray_metrics.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_metrics, "_make", lambda metric: pytest.fail("it was made"))
    RayMetrics("agent").set("vz_step", 1)


def test_what_goes_wrong_is_logged_once(monkeypatch, caplog):
    def broken(metric):
        raise ConnectionError("no agent")

    monkeypatch.setattr(ray_metrics.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_metrics, "_make", broken)
    meters = RayMetrics("agent")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            meters.observe("vz_decode_seconds", 1.0, kind="zoom")
    assert [record.message for record in caplog.records] == [
        "metrics are not exported: vz_decode_seconds: ConnectionError: no agent"
    ]


def test_a_name_that_the_catalogue_lacks_is_a_bug():
    with pytest.raises(KeyError):
        RayMetrics("agent").set("vz_moon", 1.0)


def test_a_counter_is_known_before_its_first_event(monkeypatch):
    told = []

    class Counter:
        def inc(self, value, tags):
            told.append(("inc", value, tags))

        def _record(self, value, tags):
            told.append(("_record", value, tags))

    monkeypatch.setattr(ray_metrics.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_metrics, "_make", lambda metric: Counter())
    meters = RayMetrics("agent")
    meters.add("vz_groups", 0, outcome="kept")
    meters.add("vz_groups", 2, outcome="kept")
    tags = {"run": "agent", "outcome": "kept"}
    assert told == [("_record", 0.0, tags), ("inc", 2, tags)]
