"""Trace export to an OTLP/HTTP collector in this process."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.trace_collector import TraceCollector, collect_traces
from vz_ray.monitoring import tracing
from vz_ray.monitoring.tracing import TraceExporter, TraceSpan, is_sampled
from vz_ray.utils.errors import UserError

pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")


@pytest.fixture
def collector() -> Iterator[TraceCollector]:
    with collect_traces() as collector:
        yield collector


TREE = TraceSpan(
    "episode",
    100.0,
    104.0,
    {"vz.task": "t", "vz.tokens": 7, "vz.share": 0.5, "vz.valid": True},
    (
        TraceSpan("turn 0", 100.0, 103.0, {}, (TraceSpan("generate", 100.0, 102.5),)),
        TraceSpan("reward", 103.0, 104.0),
    ),
    error="no video",
)


def test_trace_arrives_with_times_parents_and_attributes(collector):
    exporter = TraceExporter(collector.url + "/", 1.0, {"service.name": "vz_ray", "vz.run": "agent"})
    exporter.export(TREE)
    exporter.close()
    assert exporter.dropped == 0
    assert collector.paths == ["/v1/traces"]
    assert collector.resources[0]["vz.run"] == "agent"
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {"episode", "turn 0", "generate", "reward"}
    assert len({span.trace_id for span in spans.values()}) == 1
    root = spans["episode"]
    assert root.parent_span_id == b""
    assert spans["turn 0"].parent_span_id == spans["reward"].parent_span_id == root.span_id
    assert spans["generate"].parent_span_id == spans["turn 0"].span_id
    assert spans["generate"].start_time_unix_nano == 100 * 10**9
    assert spans["generate"].end_time_unix_nano == 1025 * 10**8
    attributes = {a.key: a.value for a in root.attributes}
    assert (attributes["vz.task"].string_value, attributes["vz.tokens"].int_value) == ("t", 7)
    assert (attributes["vz.share"].double_value, attributes["vz.valid"].bool_value) == (0.5, True)
    assert (root.status.code, root.status.message) == (2, "no video")


def test_each_tree_is_a_separate_trace(collector):
    exporter = TraceExporter(collector.url, 1.0, {})
    for _ in range(3):
        exporter.export(TREE)
    exporter.close()
    assert len({span.trace_id for span in collector.spans}) == 3


def test_rejected_traces_are_dropped(collector):
    collector.status = 400
    exporter = TraceExporter(collector.url, 1.0, {})
    for _ in range(2):
        exporter.export(TREE)
    exporter.close()
    assert (exporter.dropped, collector.spans) == (2, [])


def test_slow_collector_does_not_block(collector, monkeypatch):
    monkeypatch.setattr(tracing, "MAX_PENDING_TRACES", 4)
    monkeypatch.setattr(tracing, "CLOSE_TIMEOUT_S", 0.2)
    collector.delay_s = 1.0
    exporter = TraceExporter(collector.url, 1.0, {})
    start = time.monotonic()
    for _ in range(50):
        exporter.export(TREE)
    assert time.monotonic() - start < 0.5
    exporter.close()
    assert time.monotonic() - start < 5
    assert exporter.dropped >= 44


def test_missing_collector_does_not_block(monkeypatch):
    monkeypatch.setattr(tracing, "CLOSE_TIMEOUT_S", 0.5)
    exporter = TraceExporter("http://127.0.0.1:9", 1.0, {})
    start = time.monotonic()
    exporter.export(TREE)
    exporter.close()
    assert time.monotonic() - start < 5


def test_sampling_is_deterministic_and_proportional():
    keys = [f"3/task-{number}/0#0" for number in range(4000)]
    sampled = [key for key in keys if is_sampled(key, 0.1)]
    assert 300 < len(sampled) < 500
    assert sampled == [key for key in keys if is_sampled(key, 0.1)]
    assert not any(is_sampled(key, 0.0) for key in keys)
    assert all(is_sampled(key, 1.0) for key in keys)


def test_missing_package_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UserError, match=r"monitoring\.otlp_endpoint is 'http://c:4318'.* pip install 'vz_ray\[otel\]'"):
        TraceExporter("http://c:4318", 1.0, {})
