"""What the loop and the fleet tell, as metrics, traces and `live.json`."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time

import pytest

from tests.watch.making import Remembering, SomeFleet, SomePool, episode, seat, worker
from vz_ray.clips import HandleStats
from vz_ray.episode.trajectory import Status
from vz_ray.observe.live import EPISODE, STEP, Live, State
from vz_ray.observe.run_dir import RunDir
from vz_ray.observe.traces import Span
from vz_ray.rollout.state import WorkerState
from vz_ray.video.clip_reader import ReadStats
from vz_ray.watch import heartbeat
from vz_ray.watch.heartbeat import Grown, Heartbeat
from vz_ray.watch.spans import episode_span
from vz_ray.watch.watch import Watch


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir.begin(tmp_path / "agent", "seed: 0\n")[0]


def heart(watch: Watch, run: RunDir, fleet: SomeFleet, pool: SomePool, *targets: str) -> Heartbeat:
    return Heartbeat(watch, run, fleet, pool, 5.0, lambda: list(targets))


def test_an_accepted_episode_is_counted_and_timed():
    meters = Remembering()
    watch = Watch("agent", meters)
    watch.accepted(episode())
    assert meters.counts["vz_episodes", "answered"] == 1
    assert meters.counts["vz_sampled_tokens",] == 12
    assert meters.counts["vz_tool_calls", "carried_out"] == 1
    assert meters.counts["vz_tool_calls", "refused"] == 1
    assert meters.observed["vz_episode_seconds",] == [10.0]
    assert meters.observed["vz_generate_seconds",] == [2.0, 2.5, 1.5]
    assert meters.observed["vz_clip_wait_seconds", "zoom"] == [1.0]
    assert meters.observed["vz_clip_wait_seconds", "overview"] == [3.0]


def test_its_trace_is_made_of_the_times_that_it_carries():
    root = episode_span(episode(), 1000.0, "agent")
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
    assert episode_span(episode(Status.FAILED), 1.0, "a").failed == "no video"


def test_an_iteration_is_a_trace_of_what_was_done_in_turn():
    sent: list[Span] = []

    class Sent:
        dropped = 0

        def add(self, span: Span) -> None:
            sent.append(span)

    watch = Watch("agent", None, Sent())  # type: ignore[arg-type]
    watch.begun(0, 2, 0.05)
    for _ in range(2):
        for phase in ("rollout", "learn", "publish", "checkpoint"):
            watch.doing(phase)
        watch.iterated(0, {}, 1, 1)
        watch.closed(0)
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

    watch = Watch("agent", Broken())
    with caplog.at_level(logging.WARNING):
        watch.begun(0, 3, 0.05)
        watch.accepted(episode())
        watch.iterated(0, {"reward/total": 1.0}, 2, 1)
    assert "the run goes on" in caplog.text


def test_time_left_is_that_of_the_pace_since_the_loop_began(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Watch("agent")
    watch.begun(4, 10, 0.05)
    now[0] += 30
    watch.iterated(4, {}, 1, 1)
    assert watch.live.left_s == 5 * 30
    assert (watch.live.iteration, watch.live.iterations) == (5, 10)


async def test_a_beat_tells_of_fleet_and_clips(run):
    meters = Remembering()
    watch = Watch("agent", meters)
    fleet = SomeFleet(waiting=3, there=[seat("a", load=4), seat("b", WorkerState.DEAD)], lost=1)
    fleet.workers = [worker("a", 100)]
    pool = SomePool(HandleStats(in_flight=1), ReadStats(hits=10, misses=10))
    beating = heart(watch, run, fleet, pool, "10.0.0.1:8080")
    watch.begun(0, 9, 0.05)
    await beating.beat()
    # What was there before the watch began is none of its growth.
    assert meters.counts["vz_clip_frames", "memory"] == meters.counts["vz_lost_workers",] == 0
    assert meters.gauges["vz_tokens_per_second",] == 0
    fleet.workers = [worker("a", 600, HandleStats(in_flight=2, waiting=5, lost=1))]
    fleet.lost = 3
    pool.read = ReadStats(hits=40, misses=11)
    pool.silent = ("decode-actor-1",)
    await asyncio.sleep(0.05)
    await beating.beat()
    assert meters.gauges["vz_workers", "ready"] == meters.gauges["vz_workers", "dead"] == 1
    assert meters.gauges["vz_episodes_playing",] == 4
    assert meters.gauges["vz_episodes_waiting",] == 3
    assert 0 < meters.gauges["vz_tokens_per_second",] < 500 / 0.05
    assert meters.counts["vz_lost_workers",] == 2
    assert meters.gauges["vz_clip_requests", "in_flight"] == 3
    assert meters.gauges["vz_clip_requests", "waiting"] == 5
    assert meters.counts["vz_clip_failures", "lost"] == 1
    assert meters.counts["vz_clip_frames", "memory"] == 30
    assert meters.counts["vz_clip_frames", "decoded"] == 1
    assert meters.gauges["vz_decoders", "answering"] == meters.gauges["vz_decoders", "silent"] == 1
    live = Live.read(run.live)
    assert live is not None
    assert live.standing(time.time()) is State.RUNNING
    assert live.fleet["workers"] == {"ready": 1, "dead": 1}
    assert [s["name"] for s in live.fleet["seats"]] == ["a"]
    assert live.clips["hit_ratio"] == pytest.approx(40 / 51)
    assert json.loads(run.scrape.read_text()) == [{"targets": ["10.0.0.1:8080"], "labels": {"job": "vz_ray"}}]


async def test_gauges_of_the_last_iteration_are_told_again_at_every_beat(run):
    meters = Remembering()
    watch = Watch("agent", meters)
    watch.iterated(0, {"reward/total": 0.5, "reward/tool": math.nan, "time/learn_s": 2.0}, 3, 2)
    beating = heart(watch, run, SomeFleet(), SomePool())
    for _ in range(2):
        meters.gauges.clear()
        await beating.beat()
        assert meters.gauges["vz_reward", "total"] == 0.5
        assert meters.gauges["vz_phase_seconds", "learn"] == 2.0
    assert meters.counts["vz_groups", "dropped"] == 1
    assert meters.counts["vz_nonfinite_values",] == 1


async def test_a_fleet_that_does_not_answer_stops_no_heartbeat(run, monkeypatch):
    monkeypatch.setattr(heartbeat, "ANSWER_S", 0.05)
    watch = Watch("agent", Remembering())
    beating = heart(watch, run, SomeFleet(hangs=True, there=[seat("a", load=2)]), SomePool())
    await asyncio.wait_for(beating.beat(), 5)
    live = Live.read(run.live)
    assert live is not None
    assert live.fleet["playing"] == 2


async def test_a_beat_that_fails_is_told_once_and_the_next_comes(run, caplog):
    watch = Watch("agent", Remembering())
    fleet = SomeFleet()
    beating = Heartbeat(watch, run, fleet, SomePool(), 0.01, list)
    fleet.seats = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    task = asyncio.create_task(beating.beat_on())
    await asyncio.sleep(0.2)
    assert not run.live.exists()
    del fleet.seats
    await asyncio.sleep(0.3)
    assert run.live.exists()
    assert [r.message for r in caplog.records].count("a heartbeat failed; the run goes on") == 1
    task.cancel()


async def test_the_last_word_says_how_it_ended(run):
    watch = Watch("agent", Remembering())
    await heart(watch, run, SomeFleet(), SomePool()).end(State.FAILED, "UserError: no disk")
    live = Live.read(run.live)
    assert live is not None
    assert (live.standing(time.time()), live.error) == (State.FAILED, "UserError: no disk")


async def test_the_last_word_is_of_the_workers_as_they_are_then(run):
    watch, fleet = Watch("agent", Remembering()), SomeFleet(there=[seat("a", WorkerState.SYNCING)])
    beating = heart(watch, run, fleet, SomePool())
    await beating.beat()
    fleet.there = [seat("a")]
    await beating.end(State.ENDED, "")
    live = Live.read(run.live)
    assert live is not None
    assert live.fleet["workers"] == {"ready": 1}


def test_counts_of_one_that_began_anew_start_at_nothing():
    grown = Grown()
    grown.by("a", 100)
    grown.begun = True
    assert [grown.by("a", count) for count in (110, 110, 4, 9)] == [10, 0, 4, 5]
    assert grown.by("new", 3) == 3


async def test_a_run_without_a_fleet_tells_of_its_steps_and_decoders(run):
    meters = Remembering()
    watch = Watch("agent", meters, unit=STEP, rows="policy.jsonl")
    beating = Heartbeat(watch, run, None, SomePool(HandleStats(in_flight=2)), 5.0, list)
    watch.begun(3, 10)
    watch.doing("learn")
    watch.stepped(4, {"learner/loss": 0.5})
    watch.saved(4)
    await beating.beat()
    live = Live.read(run.live)
    assert live is not None
    assert (live.unit, live.rows, live.iteration, live.iterations) == (STEP, "policy.jsonl", 4, 10)
    assert (live.phase, live.fleet, live.clips["in_flight"]) == ("learn", {}, 2)
    assert live.left_s is not None
    assert meters.gauges["vz_learner_loss",] == 0.5
    assert meters.gauges["vz_iteration",] == 4
    assert meters.gauges["vz_checkpoint_timestamp_seconds",] == live.checkpoint["at_s"]
    told = {name for name, *_ in (*meters.gauges, *meters.counts)}
    # Alerts on them would speak of workers that nobody misses, and of a limit that there is not.
    assert not told & {"vz_workers", "vz_episodes_waiting", "vz_mismatch_kl_limit_nats", "vz_episodes"}


async def test_episodes_that_are_on_disk_one_by_one_have_no_checkpoint_to_grow_old(run):
    meters = Remembering()
    watch = Watch("agent", meters, unit=EPISODE)
    watch.begun(0, 10)
    watch.stepped(1)
    await Heartbeat(watch, run, None, SomePool(), 5.0, list).beat()
    assert ("vz_checkpoint_timestamp_seconds",) not in meters.gauges
    assert meters.gauges["vz_heartbeat_timestamp_seconds",] > 0


def test_where_time_ends_a_run_nobody_says_what_is_left():
    watch = Watch("agent", unit=STEP)
    watch.begun(0, 0)
    watch.stepped(5, {})
    assert (watch.live.iteration, watch.live.left_s) == (5, None)
