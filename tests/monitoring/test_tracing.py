"""Traces, received by a real OTLP/HTTP endpoint in this process and decoded from their protobuf."""

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
    with collect_traces() as found:
        yield found


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


def test_a_tree_arrives_with_its_times_parents_and_attributes(collector):
    sender = TraceExporter(collector.url + "/", 1.0, {"service.name": "vz_ray", "vz.run": "agent"})
    sender.export(TREE)
    sender.close()
    assert sender.dropped == 0
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
    told = {a.key: a.value for a in root.attributes}
    assert (told["vz.task"].string_value, told["vz.tokens"].int_value) == ("t", 7)
    assert (told["vz.share"].double_value, told["vz.valid"].bool_value) == (0.5, True)
    assert (root.status.code, root.status.message) == (2, "no video")


def test_each_tree_is_a_trace_of_its_own(collector):
    sender = TraceExporter(collector.url, 1.0, {})
    for _ in range(3):
        sender.export(TREE)
    sender.close()
    assert len({span.trace_id for span in collector.spans}) == 3


def test_a_collector_that_refuses_costs_only_the_traces(collector):
    collector.status = 400
    sender = TraceExporter(collector.url, 1.0, {})
    for _ in range(2):
        sender.export(TREE)
    sender.close()
    assert (sender.dropped, collector.spans) == (2, [])


def test_nobody_waits_for_a_collector_that_is_slow(collector, monkeypatch):
    monkeypatch.setattr(tracing, "QUEUE", 4)
    monkeypatch.setattr(tracing, "CLOSE_TIMEOUT_S", 0.2)
    collector.wait_s = 1.0
    sender = TraceExporter(collector.url, 1.0, {})
    began = time.monotonic()
    for _ in range(50):
        sender.export(TREE)
    assert time.monotonic() - began < 0.5
    sender.close()
    assert time.monotonic() - began < 5
    assert sender.dropped >= 44


def test_nobody_waits_for_a_collector_that_is_not_there(monkeypatch):
    monkeypatch.setattr(tracing, "CLOSE_TIMEOUT_S", 0.5)
    sender = TraceExporter("http://127.0.0.1:9", 1.0, {})
    began = time.monotonic()
    sender.export(TREE)
    sender.close()
    assert time.monotonic() - began < 5


def test_a_share_is_about_that_and_always_the_same():
    keys = [f"3/task-{number}/0#0" for number in range(4000)]
    chosen = [key for key in keys if is_sampled(key, 0.1)]
    assert 300 < len(chosen) < 500
    assert chosen == [key for key in keys if is_sampled(key, 0.1)]
    assert not any(is_sampled(key, 0.0) for key in keys)
    assert all(is_sampled(key, 1.0) for key in keys)


def test_what_is_to_be_installed_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(
        UserError, match=r"observe\.otlp_endpoint is 'http://c:4318' .* pip install 'vz_ray\[otel\]'"
    ):
        TraceExporter("http://c:4318", 1.0, {})
