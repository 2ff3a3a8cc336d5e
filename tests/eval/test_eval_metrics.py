"""Metrics against hand-computed values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.eval.conftest import MakeResult
from vz_ray.config.run import EvalConfig
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.eval.bootstrap import bootstrap_mean, paired_difference
from vz_ray.eval.eval_log import EvalResult
from vz_ray.eval.eval_metrics import accuracy_by_task, compute_eval_metrics, step_metrics, zoom_accuracy_gain
from vz_ray.monitoring import metric_names
from vz_ray.rewards import UNPARSED_NOTE


def test_metrics_of_five_results(make_result: MakeResult) -> None:
    results = [
        make_result("a"),
        make_result("b", correct=False, zooms=[None, (40.0,)], note=f"{UNPARSED_NOTE}: 'x'"),
        make_result("c", correct=True, zooms=[], kind="count", seconds=6.0),
        make_result("d", correct=False, zooms=[], status=EpisodeStatus.NO_ANSWER, events=((10.0, 11.0),)),
        make_result("e", valid=False, status=EpisodeStatus.FAILED),
    ]
    metrics = compute_eval_metrics(results)
    assert (metrics.questions, metrics.invalid, metrics.unparsed) == (4, 1, 1)
    assert metrics.accuracy is not None
    assert (metrics.accuracy.mean, metrics.accuracy.count) == (0.5, 4)
    assert {kind: interval.count for kind, interval in metrics.accuracy_by_kind.items()} == {
        "count": 1,
        "identify": 3,
    }
    assert metrics.frames_mean == (6 + 5 + 4 + 4) / 4
    assert metrics.zooms_mean == 2 / 4
    assert metrics.zoom_call_rate == 2 / 4
    assert metrics.valid_zoom_rate == 2 / 3
    assert metrics.event_coverage == 1 / 4  # only a's zoom; d's event is in its overview
    assert metrics.event_visible_rate == 2 / 4
    assert metrics.reading_accuracy == 1 / 2
    assert metrics.seconds_mean == 3.0
    assert metrics.status == {"answered": 3 / 5, "no_answer": 1 / 5, "truncated": 0, "failed": 1 / 5}
    assert metrics.reward["accuracy"] == 0.5


def test_reading_accuracy_requires_every_event(make_result: MakeResult) -> None:
    two_events = make_result(zooms=[(12.0,)], events=((12.0, 12.5), (13.0, 13.5)))
    metrics = compute_eval_metrics([two_events])
    assert (metrics.event_coverage, metrics.event_visible_rate, metrics.reading_accuracy) == (1.0, 0.0, None)


def test_event_span_includes_its_start_but_not_its_end(make_result: MakeResult) -> None:
    assert compute_eval_metrics([make_result(zooms=[(12.5,)])]).event_coverage == 1
    assert compute_eval_metrics([make_result(zooms=[(14.0,)])]).event_coverage == 0
    assert compute_eval_metrics([make_result(zooms=[(14.0,)], events=((14.0, 14.0),))]).event_coverage == 1


def test_metrics_without_samples_are_none(make_result: MakeResult) -> None:
    empty = compute_eval_metrics([])
    assert (empty.questions, empty.accuracy, empty.frames_mean, empty.valid_zoom_rate) == (
        0,
        None,
        None,
        None,
    )
    assert compute_eval_metrics([make_result(zooms=[], events=())]).event_coverage is None


def test_unscored_episode_raises(make_result: MakeResult) -> None:
    result = make_result()
    unscored = replace(result, trajectory=replace(result.trajectory, reward=None))
    with pytest.raises(ValueError, match="0/t0/0#0"):
        compute_eval_metrics([unscored])


def test_zoom_accuracy_gain_compares_samples_of_a_group(make_result: MakeResult) -> None:
    """Groups a and b gain 1 and -1/2; c has no sample without a zoom, and an invalid sample does not count."""
    results = [
        *(make_result("a"), make_result("a", correct=False, zooms=[])),
        *(make_result("b", correct=False), make_result("b", zooms=[None]), make_result("b", correct=False, zooms=[])),
        *(make_result("c"), make_result("c", zooms=[], valid=False, status=EpisodeStatus.FAILED)),
    ]
    assert zoom_accuracy_gain(results) == pytest.approx((1 - 0.5) / 2)
    assert zoom_accuracy_gain(results[-2:]) is None
    assert step_metrics(results)[metric_names.ZOOM_ACCURACY_GAIN] == pytest.approx(0.25)
    assert step_metrics(results)[metric_names.OVERVIEW_FRAMES] == 4


def test_step_metrics_use_catalog_names(make_result: MakeResult) -> None:
    flat = step_metrics([make_result("a"), make_result("b", correct=False)])
    assert flat[metric_names.REWARD_ACCURACY] == 0.5
    assert flat[metric_names.EVENT_COVERAGE] == 1.0
    assert all(isinstance(value, float | int) for value in flat.values())


def test_invalid_reasons_are_counted_and_logged(make_result: MakeResult) -> None:
    notes = ("judge timeout: 30 s", "judge timeout: 31 s", "judge nonsense: 'well'", "failed: worker died")
    results = [
        make_result("a"),
        *(make_result(f"b{k}", valid=False, note=note) for k, note in enumerate(notes)),
    ]
    metrics = compute_eval_metrics(results)
    assert metrics.invalid_reasons == {"judge timeout": 2, "judge nonsense": 1, "failed": 1}
    flat = step_metrics(results)
    assert flat["episodes/invalid"] == 4 / 5
    assert flat["episodes/invalid/judge_timeout"] == 2 / 5
    assert flat["episodes/invalid/judge_nonsense"] == flat["episodes/invalid/failed"] == 1 / 5


def test_optional_reward_parts_average_over_their_episodes(make_result: MakeResult) -> None:
    def scored(task: str, extra: dict[str, float]) -> EvalResult:
        result = make_result(task)
        assert result.trajectory.reward is not None
        reward = replace(result.trajectory.reward, extra=extra)
        return replace(result, trajectory=replace(result.trajectory, reward=reward))

    flat = step_metrics([scored("a", {"judge_score": 4.0}), scored("b", {"frames": -0.5}), make_result("c")])
    assert flat["reward/judge_score"] == 4.0
    assert flat["reward/frames"] == -0.5
    assert flat["reward/accuracy"] == 1.0


def test_accuracy_by_task_averages_valid_samples(make_result: MakeResult) -> None:
    results = [make_result("a"), make_result("a", correct=False), make_result("b", valid=False)]
    assert accuracy_by_task(results) == {"a": 0.5}


def test_bootstrap_of_a_constant_has_zero_width() -> None:
    interval = bootstrap_mean([1.0] * 20)
    assert (interval.mean, interval.low, interval.high, interval.count) == (1.0, 1.0, 1.0, 20)


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    interval = bootstrap_mean([0.0, 1.0] * 200, config=EvalConfig(4000))
    assert interval.mean == 0.5
    assert (interval.low, interval.high) == (pytest.approx(0.451, abs=0.006), pytest.approx(0.549, abs=0.006))


def test_repeats_within_clusters_do_not_narrow_the_interval() -> None:
    values = [0.0, 1.0] * 10
    single = bootstrap_mean(values, range(20))
    repeated = bootstrap_mean([v for v in values for _ in range(50)], [i for i in range(20) for _ in range(50)])
    assert (repeated.low, repeated.high) == (single.low, single.high)


def test_paired_difference_matches_tasks_by_id() -> None:
    interval = paired_difference({"a": 1, "b": 1, "x": 0}, {"b": 1, "a": 0, "y": 1})
    assert (interval.mean, interval.count) == (0.5, 2)
    with pytest.raises(ValueError, match="no task in common"):
        paired_difference({"a": 1}, {"b": 1})


def test_bootstrap_rejects_empty_values_and_wrong_clusters() -> None:
    with pytest.raises(ValueError, match="values is empty"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="clusters has 1 entries"):
        bootstrap_mean([1, 2], ["v"])


def test_selector_fallbacks_and_gate_decisions_are_counted(make_result: MakeResult) -> None:
    extras = [
        {"overview": {"selector": "tspo", "used_fallback": True}, "gate": {"zoom": True}},
        {"overview": {"selector": "tspo", "used_fallback": False}, "gate": {"zoom": False}},
        {},
    ]
    results = [make_result(name) for name in "abc"]
    annotated = [
        replace(result, trajectory=replace(result.trajectory, extra=extra))
        for result, extra in zip(results, extras, strict=True)
    ]
    metrics = compute_eval_metrics(annotated)
    assert (metrics.selector_fallbacks, metrics.gate_rate) == (1, 0.5)
    assert step_metrics(annotated)[metric_names.OVERVIEW_FALLBACK_RATE] == pytest.approx(1 / 3)
    assert metric_names.OVERVIEW_FALLBACK_RATE not in step_metrics(results)
    assert compute_eval_metrics(results).gate_rate is None
