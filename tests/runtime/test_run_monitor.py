"""Run monitor, heartbeat and episode traces: metrics, spans and `live.json`."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time

import pytest

from tests.runtime.monitor_fakes import (
    FakeDecodeStats,
    FakeRolloutStats,
    RecordingMetrics,
    make_trajectory,
    make_worker_stats,
    make_worker_status,
)
from vz_ray.decode import DecodeClientStats
from vz_ray.env.trajectory import EpisodeStatus, ZoomErrorKind
from vz_ray.monitoring.live_status import LiveStatus, RunKind, RunState
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.monitoring.tracing import TraceSpan
from vz_ray.rollout.worker_handle import WorkerState
from vz_ray.runtime import heartbeat
from vz_ray.runtime.episode_span import episode_span
from vz_ray.runtime.heartbeat import CounterDeltas, Heartbeat
from vz_ray.runtime.run_monitor import RunMonitor
from vz_ray.video.clip_reader import ReaderStats


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    return RunDir.create_or_resume(tmp_path / "agent", "seed: 0\n")[0]


def make_heartbeat(
    monitor: RunMonitor, run_dir: RunDir, rollout: FakeRolloutStats, pool: FakeDecodeStats, *targets: str
) -> Heartbeat:
    return Heartbeat(monitor, run_dir, rollout, pool, 5.0, lambda: list(targets))


def read_status(run_dir: RunDir) -> LiveStatus:
    status = LiveStatus.read(run_dir.live_status)
    assert status is not None
    return status


def test_accepted_episode_is_counted_and_timed():
    metrics = RecordingMetrics()
    monitor = RunMonitor("agent", metrics)
    monitor.on_episode(make_trajectory())
    assert metrics.counts["vz_episodes", "answered"] == 1
    assert metrics.counts["vz_sampled_tokens",] == 12
    assert metrics.counts["vz_zoom_calls", "valid"] == 1
    assert metrics.counts["vz_zoom_calls", "rejected"] == 1
    assert metrics.observed["vz_episode_seconds",] == [10.0]
    assert metrics.observed["vz_generate_seconds",] == [2.0, 2.5, 1.5]
    assert metrics.observed["vz_clip_wait_seconds", "zoom"] == [1.0]
    assert metrics.observed["vz_clip_wait_seconds", "overview"] == [3.0]


def test_episode_trace_uses_the_trajectory_times():
    root = episode_span(make_trajectory(), 1000.0, "agent")
    assert (root.name, root.start_s, root.end_s) == ("episode", 989.5, 1000.0)
    children = [(span.name, span.start_s, span.end_s) for span in root.children]
    assert children == [
        ("overview", 989.5, 992.5),
        ("turn 0", 992.5, 995.5),
        ("turn 1", 995.5, 998.0),
        ("turn 2", 998.0, 999.5),
        ("reward", 999.5, 1000.0),
    ]
    first = root.children[1]
    assert [(s.name, s.start_s, s.end_s) for s in first.children] == [
        ("generate", 992.5, 994.5),
        ("clip", 994.5, 995.5),
    ]
    assert root.children[2].attributes == {"vz.zoom_error": ZoomErrorKind.OUT_OF_RANGE.value}
    assert (root.attributes["vz.episode"], root.attributes["vz.weight_version"]) == ("3/task/1#0", 7)
    assert root.children[4].attributes["vz.reward.total"] == 1.4
    assert episode_span(make_trajectory(EpisodeStatus.FAILED), 1.0, "a").error == "no video"


def test_step_trace_has_one_span_per_phase():
    exported: list[TraceSpan] = []

    class FakeExporter:
        dropped = 0

        def export(self, span: TraceSpan) -> None:
            exported.append(span)

    monitor = RunMonitor("agent", None, FakeExporter())  # type: ignore[arg-type]
    monitor.on_start(0, 2, 0.05)
    for _ in range(2):
        for phase in ("rollout", "learn", "publish", "checkpoint"):
            monitor.on_phase(phase)
        monitor.on_rl_step(0, {}, 1, 1)
        monitor.on_step_end(0)
    assert [[child.name for child in span.children] for span in exported] == 2 * [
        ["rollout", "learn", "publish", "checkpoint"]
    ]
    for span in exported:
        ends = [child.end_s for child in span.children]
        assert [child.start_s for child in span.children][1:] == ends[:-1]
        assert (span.start_s, span.end_s) == (span.children[0].start_s, ends[-1])


def test_monitor_errors_do_not_reach_the_run(caplog):
    class Broken:
        def set(self, *args, **labels):
            raise OSError("no")

        add = observe = set

    monitor = RunMonitor("agent", Broken())
    with caplog.at_level(logging.WARNING):
        monitor.on_start(0, 3, 0.05)
        monitor.on_episode(make_trajectory())
        monitor.on_rl_step(0, {"reward/total": 1.0}, 2, 1)
    assert "the run continues" in caplog.text


def test_eta_follows_the_pace_since_the_loop_started(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monitor = RunMonitor("agent")
    monitor.on_start(4, 10, 0.05)
    now[0] += 30
    monitor.on_rl_step(4, {}, 1, 1)
    assert monitor.status.eta_s == 5 * 30
    assert (monitor.status.step, monitor.status.max_steps) == (5, 10)


async def test_heartbeat_reports_workers_and_decoders(run_dir):
    metrics = RecordingMetrics()
    monitor = RunMonitor("agent", metrics)
    rollout = FakeRolloutStats(
        queued_episodes=3,
        statuses=[make_worker_status("a", load=4), make_worker_status("b", WorkerState.DEAD)],
        lost_workers=1,
    )
    rollout.workers = [make_worker_stats("a", 100)]
    pool = FakeDecodeStats(DecodeClientStats(in_flight=1), ReaderStats(hits=10, misses=10))
    heartbeat_under_test = make_heartbeat(monitor, run_dir, rollout, pool, "10.0.0.1:8080")
    monitor.on_start(0, 9, 0.05)
    await heartbeat_under_test.beat()
    # Counts from before the monitor started are not increases.
    assert metrics.counts["vz_decode_frames", "memory"] == metrics.counts["vz_lost_workers",] == 0
    assert metrics.gauges["vz_tokens_per_second",] == 0
    rollout.workers = [make_worker_stats("a", 600, DecodeClientStats(in_flight=2, waiting=5, lost=1))]
    rollout.lost_workers = 3
    pool.reader = ReaderStats(hits=40, misses=11)
    pool.unresponsive = ("decoder-1",)
    await asyncio.sleep(0.05)
    await heartbeat_under_test.beat()
    assert metrics.gauges["vz_workers", "ready"] == metrics.gauges["vz_workers", "dead"] == 1
    assert metrics.gauges["vz_episodes_running",] == 4
    assert metrics.gauges["vz_episodes_waiting",] == 3
    assert 0 < metrics.gauges["vz_tokens_per_second",] < 500 / 0.05
    assert metrics.counts["vz_lost_workers",] == 2
    assert metrics.gauges["vz_decode_requests", "in_flight"] == 3
    assert metrics.gauges["vz_decode_requests", "waiting"] == 5
    assert metrics.counts["vz_decode_failures", "lost"] == 1
    assert metrics.counts["vz_decode_frames", "memory"] == 30
    assert metrics.counts["vz_decode_frames", "decoded"] == 1
    assert metrics.gauges["vz_decoders", "responsive"] == 1
    assert metrics.gauges["vz_decoders", "unresponsive"] == 1
    status = read_status(run_dir)
    assert status.state_at(time.time()) is RunState.RUNNING
    assert status.rollout["workers"] == {"ready": 1, "dead": 1}
    assert [worker["name"] for worker in status.rollout["worker_statuses"]] == ["a"]
    assert status.decode["hit_ratio"] == pytest.approx(40 / 51)
    assert json.loads(run_dir.prometheus_targets.read_text()) == [
        {"targets": ["10.0.0.1:8080"], "labels": {"job": "vz_ray"}}
    ]


async def test_step_gauges_are_set_at_every_heartbeat(run_dir):
    metrics = RecordingMetrics()
    monitor = RunMonitor("agent", metrics)
    monitor.on_rl_step(0, {"reward/total": 0.5, "reward/tool": math.nan, "time/learn_seconds": 2.0}, 3, 2)
    heartbeat_under_test = make_heartbeat(monitor, run_dir, FakeRolloutStats(), FakeDecodeStats())
    for _ in range(2):
        metrics.gauges.clear()
        await heartbeat_under_test.beat()
        assert metrics.gauges["vz_reward", "total"] == 0.5
        assert metrics.gauges["vz_phase_seconds", "learn"] == 2.0
    assert metrics.counts["vz_groups", "dropped"] == 1
    assert metrics.counts["vz_nonfinite_values",] == 1


async def test_hung_workers_do_not_stop_the_heartbeat(run_dir, monkeypatch):
    monkeypatch.setattr(heartbeat, "STATS_TIMEOUT_S", 0.05)
    monitor = RunMonitor("agent", RecordingMetrics())
    heartbeat_under_test = make_heartbeat(
        monitor,
        run_dir,
        FakeRolloutStats(hangs=True, statuses=[make_worker_status("a", load=2)]),
        FakeDecodeStats(),
    )
    await asyncio.wait_for(heartbeat_under_test.beat(), 5)
    status = read_status(run_dir)
    assert status.rollout["running"] == 2


async def test_failed_heartbeat_is_logged_once_and_retried(run_dir, caplog):
    monitor = RunMonitor("agent", RecordingMetrics())
    rollout = FakeRolloutStats()
    heartbeat_under_test = Heartbeat(monitor, run_dir, rollout, FakeDecodeStats(), 0.01, list)
    rollout.worker_statuses = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    task = asyncio.create_task(heartbeat_under_test.run())
    await asyncio.sleep(0.2)
    assert not run_dir.live_status.exists()
    del rollout.worker_statuses
    await asyncio.sleep(0.3)
    assert run_dir.live_status.exists()
    assert [r.message for r in caplog.records].count("Heartbeat failed; the run continues") == 1
    task.cancel()


async def test_final_status_has_state_and_error(run_dir):
    monitor = RunMonitor("agent", RecordingMetrics())
    await make_heartbeat(monitor, run_dir, FakeRolloutStats(), FakeDecodeStats()).finish(
        RunState.FAILED, "UserError: no disk"
    )
    status = read_status(run_dir)
    assert (status.state_at(time.time()), status.error) == (RunState.FAILED, "UserError: no disk")


async def test_final_status_has_the_final_worker_states(run_dir):
    monitor, rollout = (
        RunMonitor("agent", RecordingMetrics()),
        FakeRolloutStats(statuses=[make_worker_status("a", WorkerState.SYNCING)]),
    )
    heartbeat_under_test = make_heartbeat(monitor, run_dir, rollout, FakeDecodeStats())
    await heartbeat_under_test.beat()
    rollout.statuses = [make_worker_status("a")]
    await heartbeat_under_test.finish(RunState.ENDED, "")
    status = read_status(run_dir)
    assert status.rollout["workers"] == {"ready": 1}


def test_reset_counter_counts_from_zero():
    deltas = CounterDeltas()
    deltas.increase("a", 100)
    deltas.started = True
    assert [deltas.increase("a", count) for count in (110, 110, 4, 9)] == [10, 0, 4, 5]
    assert deltas.increase("new", 3) == 3


async def test_sft_run_reports_steps_and_decoders(run_dir):
    metrics = RecordingMetrics()
    monitor = RunMonitor("agent", metrics, run_kind=RunKind.SFT, metrics_file="policy.jsonl")
    heartbeat_under_test = Heartbeat(monitor, run_dir, None, FakeDecodeStats(DecodeClientStats(in_flight=2)), 5.0, list)
    monitor.on_start(3, 10)
    monitor.on_phase("learn")
    monitor.on_progress(4, {"learner/loss": 0.5})
    monitor.on_checkpoint(4)
    await heartbeat_under_test.beat()
    status = read_status(run_dir)
    assert (status.run_kind, status.metrics_file, status.step, status.max_steps) == (
        RunKind.SFT,
        "policy.jsonl",
        4,
        10,
    )
    assert (status.phase, status.rollout, status.decode["in_flight"]) == ("learn", {}, 2)
    assert status.eta_s is not None
    assert metrics.gauges["vz_learner_loss",] == 0.5
    assert metrics.gauges["vz_step",] == 4
    assert metrics.gauges["vz_last_checkpoint_timestamp_seconds",] == status.checkpoint["at_s"]
    recorded = {name for name, *_ in (*metrics.gauges, *metrics.counts)}
    # These would trigger alerts about workers and limits that the run_dir does not have.
    assert not recorded & {"vz_workers", "vz_episodes_waiting", "vz_mismatch_kl_limit_nats", "vz_episodes"}


async def test_distillation_run_has_no_checkpoint_age(run_dir):
    metrics = RecordingMetrics()
    monitor = RunMonitor("agent", metrics, run_kind=RunKind.DISTILL)
    monitor.on_start(0, 10)
    monitor.on_progress(1)
    await Heartbeat(monitor, run_dir, None, FakeDecodeStats(), 5.0, list).beat()
    assert ("vz_last_checkpoint_timestamp_seconds",) not in metrics.gauges
    assert metrics.gauges["vz_heartbeat_timestamp_seconds",] > 0


def test_eta_is_unknown_without_max_steps():
    monitor = RunMonitor("agent", run_kind=RunKind.SFT)
    monitor.on_start(0, 0)
    monitor.on_progress(5, {})
    assert (monitor.status.step, monitor.status.eta_s) == (5, None)
