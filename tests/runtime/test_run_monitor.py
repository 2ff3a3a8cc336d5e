"""What the loop and the fleet tell, as metrics, traces and `live.json`."""

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
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.monitoring.live_status import DISTILL_RUN, SFT_RUN, LiveStatus, RunState
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.monitoring.tracing import TraceSpan
from vz_ray.rollout.worker_handle import WorkerState
from vz_ray.runtime import heartbeat
from vz_ray.runtime.episode_span import episode_span
from vz_ray.runtime.heartbeat import CounterDeltas, Heartbeat
from vz_ray.runtime.run_monitor import RunMonitor
from vz_ray.video.clip_reader import ReaderStats


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir.create_or_resume(tmp_path / "agent", "seed: 0\n")[0]


def heart(
    watch: RunMonitor, run: RunDir, fleet: FakeRolloutStats, pool: FakeDecodeStats, *targets: str
) -> Heartbeat:
    return Heartbeat(watch, run, fleet, pool, 5.0, lambda: list(targets))


def test_an_accepted_episode_is_counted_and_timed():
    meters = RecordingMetrics()
    watch = RunMonitor("agent", meters)
    watch.on_episode(make_trajectory())
    assert meters.counts["vz_episodes", "answered"] == 1
    assert meters.counts["vz_sampled_tokens",] == 12
    assert meters.counts["vz_zoom_calls", "carried_out"] == 1
    assert meters.counts["vz_zoom_calls", "refused"] == 1
    assert meters.observed["vz_episode_seconds",] == [10.0]
    assert meters.observed["vz_generate_seconds",] == [2.0, 2.5, 1.5]
    assert meters.observed["vz_clip_wait_seconds", "zoom"] == [1.0]
    assert meters.observed["vz_clip_wait_seconds", "overview"] == [3.0]


def test_its_trace_is_made_of_the_times_that_it_carries():
    root = episode_span(make_trajectory(), 1000.0, "agent")
    assert (root.name, root.start_s, root.end_s) == ("episode", 989.5, 1000.0)
    parts = [(span.name, span.start_s, span.end_s) for span in root.children]
    assert parts == [
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
    assert root.children[2].attributes == {"vz.refused": "outside"}
    assert (root.attributes["vz.episode"], root.attributes["vz.weight_version"]) == ("3/task/1#0", 7)
    assert root.children[4].attributes["vz.reward.total"] == 1.4
    assert episode_span(make_trajectory(EpisodeStatus.FAILED), 1.0, "a").error == "no video"


def test_an_iteration_is_a_trace_of_what_was_done_in_turn():
    sent: list[TraceSpan] = []

    class Sent:
        dropped = 0

        def add(self, span: TraceSpan) -> None:
            sent.append(span)

    watch = RunMonitor("agent", None, Sent())  # type: ignore[arg-type]
    watch.on_start(0, 2, 0.05)
    for _ in range(2):
        for phase in ("rollout", "learn", "publish", "checkpoint"):
            watch.on_phase(phase)
        watch.on_rl_step(0, {}, 1, 1)
        watch.on_step_end(0)
    assert [[part.name for part in span.children] for span in sent] == 2 * [
        ["rollout", "learn", "publish", "checkpoint"]
    ]
    for span in sent:
        ends = [part.end_s for part in span.children]
        assert [part.start_s for part in span.children][1:] == ends[:-1]
        assert (span.start_s, span.end_s) == (span.children[0].start_s, ends[-1])


def test_nothing_that_goes_wrong_in_the_watch_reaches_the_run(caplog):
    class Broken:
        def set(self, *args, **labels):
            raise OSError("no")

        add = observe = set

    watch = RunMonitor("agent", Broken())
    with caplog.at_level(logging.WARNING):
        watch.on_start(0, 3, 0.05)
        watch.on_episode(make_trajectory())
        watch.on_rl_step(0, {"reward/total": 1.0}, 2, 1)
    assert "the run goes on" in caplog.text


def test_time_left_is_that_of_the_pace_since_the_loop_began(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = RunMonitor("agent")
    watch.on_start(4, 10, 0.05)
    now[0] += 30
    watch.on_rl_step(4, {}, 1, 1)
    assert watch.status.eta_s == 5 * 30
    assert (watch.status.step, watch.status.max_steps) == (5, 10)


async def test_a_beat_tells_of_fleet_and_clips(run):
    meters = RecordingMetrics()
    watch = RunMonitor("agent", meters)
    fleet = FakeRolloutStats(
        queued_episodes=3,
        statuses=[make_worker_status("a", load=4), make_worker_status("b", WorkerState.DEAD)],
        lost_workers=1,
    )
    fleet.workers = [make_worker_stats("a", 100)]
    pool = FakeDecodeStats(DecodeClientStats(in_flight=1), ReaderStats(hits=10, misses=10))
    beating = heart(watch, run, fleet, pool, "10.0.0.1:8080")
    watch.on_start(0, 9, 0.05)
    await beating.beat()
    # What was there before the watch began is none of its growth.
    assert meters.counts["vz_decode_frames", "memory"] == meters.counts["vz_lost_workers",] == 0
    assert meters.gauges["vz_tokens_per_second",] == 0
    fleet.workers = [make_worker_stats("a", 600, DecodeClientStats(in_flight=2, waiting=5, lost=1))]
    fleet.lost_workers = 3
    pool.read = ReaderStats(hits=40, misses=11)
    pool.silent = ("decoder-1",)
    await asyncio.sleep(0.05)
    await beating.beat()
    assert meters.gauges["vz_workers", "ready"] == meters.gauges["vz_workers", "dead"] == 1
    assert meters.gauges["vz_episodes_running",] == 4
    assert meters.gauges["vz_episodes_waiting",] == 3
    assert 0 < meters.gauges["vz_tokens_per_second",] < 500 / 0.05
    assert meters.counts["vz_lost_workers",] == 2
    assert meters.gauges["vz_decode_requests", "in_flight"] == 3
    assert meters.gauges["vz_decode_requests", "waiting"] == 5
    assert meters.counts["vz_decode_failures", "lost"] == 1
    assert meters.counts["vz_decode_frames", "memory"] == 30
    assert meters.counts["vz_decode_frames", "decoded"] == 1
    assert meters.gauges["vz_decoders", "answering"] == meters.gauges["vz_decoders", "silent"] == 1
    live = LiveStatus.read(run.live)
    assert live is not None
    assert live.state_at(time.time()) is RunState.RUNNING
    assert live.rollout["workers"] == {"ready": 1, "dead": 1}
    assert [s["name"] for s in live.rollout["seats"]] == ["a"]
    assert live.decode["hit_ratio"] == pytest.approx(40 / 51)
    assert json.loads(run.scrape.read_text()) == [{"targets": ["10.0.0.1:8080"], "labels": {"job": "vz_ray"}}]


async def test_gauges_of_the_last_iteration_are_told_again_at_every_beat(run):
    meters = RecordingMetrics()
    watch = RunMonitor("agent", meters)
    watch.on_rl_step(0, {"reward/total": 0.5, "reward/tool": math.nan, "time/learn_seconds": 2.0}, 3, 2)
    beating = heart(watch, run, FakeRolloutStats(), FakeDecodeStats())
    for _ in range(2):
        meters.gauges.clear()
        await beating.beat()
        assert meters.gauges["vz_reward", "total"] == 0.5
        assert meters.gauges["vz_phase_seconds", "learn"] == 2.0
    assert meters.counts["vz_groups", "dropped"] == 1
    assert meters.counts["vz_nonfinite_values",] == 1


async def test_a_fleet_that_does_not_answer_stops_no_heartbeat(run, monkeypatch):
    monkeypatch.setattr(heartbeat, "ANSWER_S", 0.05)
    watch = RunMonitor("agent", RecordingMetrics())
    beating = heart(
        watch,
        run,
        FakeRolloutStats(hangs=True, statuses=[make_worker_status("a", load=2)]),
        FakeDecodeStats(),
    )
    await asyncio.wait_for(beating.beat(), 5)
    live = LiveStatus.read(run.live)
    assert live is not None
    assert live.rollout["playing"] == 2


async def test_a_beat_that_fails_is_told_once_and_the_next_comes(run, caplog):
    watch = RunMonitor("agent", RecordingMetrics())
    fleet = FakeRolloutStats()
    beating = Heartbeat(watch, run, fleet, FakeDecodeStats(), 0.01, list)
    fleet.worker_statuses = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    task = asyncio.create_task(beating.run())
    await asyncio.sleep(0.2)
    assert not run.live.exists()
    del fleet.worker_statuses
    await asyncio.sleep(0.3)
    assert run.live.exists()
    assert [r.message for r in caplog.records].count("a heartbeat failed; the run goes on") == 1
    task.cancel()


async def test_the_last_word_says_how_it_ended(run):
    watch = RunMonitor("agent", RecordingMetrics())
    await heart(watch, run, FakeRolloutStats(), FakeDecodeStats()).finish(
        RunState.FAILED, "UserError: no disk"
    )
    live = LiveStatus.read(run.live)
    assert live is not None
    assert (live.state_at(time.time()), live.error) == (RunState.FAILED, "UserError: no disk")


async def test_the_last_word_is_of_the_workers_as_they_are_then(run):
    watch, fleet = (
        RunMonitor("agent", RecordingMetrics()),
        FakeRolloutStats(statuses=[make_worker_status("a", WorkerState.SYNCING)]),
    )
    beating = heart(watch, run, fleet, FakeDecodeStats())
    await beating.beat()
    fleet.statuses = [make_worker_status("a")]
    await beating.finish(RunState.ENDED, "")
    live = LiveStatus.read(run.live)
    assert live is not None
    assert live.rollout["workers"] == {"ready": 1}


def test_counts_of_one_that_began_anew_start_at_nothing():
    grown = CounterDeltas()
    grown.increase("a", 100)
    grown.started = True
    assert [grown.increase("a", count) for count in (110, 110, 4, 9)] == [10, 0, 4, 5]
    assert grown.increase("new", 3) == 3


async def test_a_run_without_a_fleet_tells_of_its_steps_and_decoders(run):
    meters = RecordingMetrics()
    watch = RunMonitor("agent", meters, run_kind=SFT_RUN, metrics_file="policy.jsonl")
    beating = Heartbeat(watch, run, None, FakeDecodeStats(DecodeClientStats(in_flight=2)), 5.0, list)
    watch.on_start(3, 10)
    watch.on_phase("learn")
    watch.on_progress(4, {"learner/loss": 0.5})
    watch.on_checkpoint(4)
    await beating.beat()
    live = LiveStatus.read(run.live)
    assert live is not None
    assert (live.run_kind, live.metrics_file, live.step, live.max_steps) == (SFT_RUN, "policy.jsonl", 4, 10)
    assert (live.phase, live.rollout, live.decode["in_flight"]) == ("learn", {}, 2)
    assert live.eta_s is not None
    assert meters.gauges["vz_learner_loss",] == 0.5
    assert meters.gauges["vz_step",] == 4
    assert meters.gauges["vz_last_checkpoint_timestamp_seconds",] == live.checkpoint["at_s"]
    told = {name for name, *_ in (*meters.gauges, *meters.counts)}
    # Alerts on them would speak of workers that nobody misses, and of a limit that there is not.
    assert not told & {"vz_workers", "vz_episodes_waiting", "vz_mismatch_kl_limit_nats", "vz_episodes"}


async def test_episodes_that_are_on_disk_one_by_one_have_no_checkpoint_to_grow_old(run):
    meters = RecordingMetrics()
    watch = RunMonitor("agent", meters, run_kind=DISTILL_RUN)
    watch.on_start(0, 10)
    watch.on_progress(1)
    await Heartbeat(watch, run, None, FakeDecodeStats(), 5.0, list).beat()
    assert ("vz_last_checkpoint_timestamp_seconds",) not in meters.gauges
    assert meters.gauges["vz_heartbeat_timestamp_seconds",] > 0


def test_where_time_ends_a_run_nobody_says_what_is_left():
    watch = RunMonitor("agent", run_kind=SFT_RUN)
    watch.on_start(0, 0)
    watch.on_progress(5, {})
    assert (watch.status.step, watch.status.eta_s) == (5, None)
