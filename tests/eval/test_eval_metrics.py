"""Figures against hand-counted ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.eval.conftest import Make
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.eval.bootstrap import bootstrap_mean, paired_difference
from vz_ray.eval.eval_log import EvalResult
from vz_ray.eval.eval_metrics import accuracy_by_task, compute_eval_metrics, step_metrics
from vz_ray.monitoring import metric_names
from vz_ray.rewards import UNPARSED_NOTE


def test_every_figure_of_a_small_set(make: Make) -> None:
    results = [
        make("a"),
        make("b", right=False, zooms=[None, (40.0,)], note=f"{UNPARSED_NOTE}: 'x'"),
        make("c", right=True, zooms=[], kind="count", seconds=6.0),
        make("d", right=False, zooms=[], status=EpisodeStatus.NO_ANSWER, events=((10.0, 11.0),)),
        make("e", valid=False, status=EpisodeStatus.FAILED),
    ]
    found = compute_eval_metrics(results)
    assert (found.questions, found.invalid, found.unparsed) == (4, 1, 1)
    assert found.accuracy is not None
    assert (found.accuracy.mean, found.accuracy.count) == (0.5, 4)
    assert {kind: interval.count for kind, interval in found.accuracy_by_kind.items()} == {
        "count": 1,
        "identify": 3,
    }
    assert found.frames_mean == (6 + 5 + 4 + 4) / 4
    assert found.zooms_mean == 2 / 4
    assert found.zoom_call_rate == 2 / 4
    assert found.valid_zoom_rate == 2 / 3
    assert found.event_coverage == 1 / 4  # only a's zoom; d's event is in its overview
    assert found.event_visible_rate == 2 / 4
    assert found.reading_accuracy == 1 / 2
    assert found.seconds_mean == 3.0
    assert found.status == {"answered": 3 / 5, "no_answer": 1 / 5, "truncated": 0, "failed": 1 / 5}
    assert found.reward["accuracy"] == 0.5


def test_reading_needs_every_event(make: Make) -> None:
    twice = make(zooms=[(12.0,)], events=((12.0, 12.5), (13.0, 13.5)))
    found = compute_eval_metrics([twice])
    assert (found.event_coverage, found.event_visible_rate, found.reading_accuracy) == (1.0, 0.0, None)


def test_an_interval_is_closed_at_its_start_and_open_at_its_end(make: Make) -> None:
    assert compute_eval_metrics([make(zooms=[(12.5,)])]).event_coverage == 1
    assert compute_eval_metrics([make(zooms=[(14.0,)])]).event_coverage == 0
    assert compute_eval_metrics([make(zooms=[(14.0,)], events=((14.0, 14.0),))]).event_coverage == 1


def test_nothing_measured_is_none_not_zero(make: Make) -> None:
    empty = compute_eval_metrics([])
    assert (empty.questions, empty.accuracy, empty.frames_mean, empty.valid_zoom_rate) == (
        0,
        None,
        None,
        None,
    )
    assert compute_eval_metrics([make(zooms=[], events=())]).event_coverage is None


def test_an_unscored_episode_is_an_error(make: Make) -> None:
    result = make()
    unscored = replace(result, trajectory=replace(result.trajectory, reward=None))
    with pytest.raises(ValueError, match="0/t0/0#0"):
        compute_eval_metrics([unscored])


def test_step_metrics_use_the_shared_names(make: Make) -> None:
    flat = step_metrics([make("a"), make("b", right=False)])
    assert flat[metric_names.REWARD_ACCURACY] == 0.5
    assert flat[metric_names.EVENT_COVERAGE] == 1.0
    assert all(isinstance(value, float | int) for value in flat.values())


def test_why_episodes_were_left_out_is_counted_and_logged(make: Make) -> None:
    notes = ("judge timeout: 30 s", "judge timeout: 31 s", "judge nonsense: 'well'", "failed: worker died")
    results = [make("a"), *(make(f"b{k}", valid=False, note=note) for k, note in enumerate(notes))]
    found = compute_eval_metrics(results)
    assert found.invalid_reasons == {"judge timeout": 2, "judge nonsense": 1, "failed": 1}
    flat = step_metrics(results)
    assert flat["episodes/invalid"] == 4 / 5
    assert flat["episodes/invalid/judge_timeout"] == 2 / 5
    assert flat["episodes/invalid/judge_nonsense"] == flat["episodes/invalid/failed"] == 1 / 5


def test_further_parts_are_logged_apart_over_the_episodes_that_have_them(make: Make) -> None:
    def scored(task: str, more: dict[str, float]) -> EvalResult:
        result = make(task)
        assert result.trajectory.reward is not None
        reward = replace(result.trajectory.reward, extra=more)
        return replace(result, trajectory=replace(result.trajectory, reward=reward))

    flat = step_metrics([scored("a", {"judge_score": 4.0}), scored("b", {"frames": -0.5}), make("c")])
    assert flat["reward/judge_score"] == 4.0
    assert flat["reward/frames"] == -0.5
    assert flat["reward/accuracy"] == 1.0


def test_accuracy_by_task_averages_samples_and_skips_invalid_ones(make: Make) -> None:
    results = [make("a"), make("a", right=False), make("b", valid=False)]
    assert accuracy_by_task(results) == {"a": 0.5}


def test_bootstrap_of_a_constant_is_that_constant() -> None:
    found = bootstrap_mean([1.0] * 20)
    assert (found.mean, found.low, found.high, found.count) == (1.0, 1.0, 1.0, 20)


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    found = bootstrap_mean([0.0, 1.0] * 200, num_resamples=4000)
    assert found.mean == 0.5
    assert (found.low, found.high) == (pytest.approx(0.451, abs=0.006), pytest.approx(0.549, abs=0.006))


def test_whole_clusters_are_drawn_so_repeats_do_not_narrow_the_interval() -> None:
    values = [0.0, 1.0] * 10
    alone = bootstrap_mean(values, range(20))
    repeated = bootstrap_mean(
        [v for v in values for _ in range(50)], [i for i in range(20) for _ in range(50)]
    )
    assert (repeated.low, repeated.high) == (alone.low, alone.high)


def test_pairs_are_matched_by_task() -> None:
    found = paired_difference({"a": 1, "b": 1, "x": 0}, {"b": 1, "a": 0, "y": 1})
    assert (found.mean, found.count) == (0.5, 2)
    with pytest.raises(ValueError, match="no task in common"):
        paired_difference({"a": 1}, {"b": 1})


def test_no_values_make_no_interval() -> None:
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="1 clusters for 2 values"):
        bootstrap_mean([1, 2], ["v"])


def test_what_the_runner_noted_is_counted(make: Make) -> None:
    notes = [
        {"overview": {"selector": "tspo", "used_fallback": True}, "gate": {"zoom": True}},
        {"overview": {"selector": "tspo", "used_fallback": False}, "gate": {"zoom": False}},
        {},
    ]
    results = [make(name) for name in "abc"]
    noted = [
        replace(result, trajectory=replace(result.trajectory, extra=note))
        for result, note in zip(results, notes, strict=True)
    ]
    found = compute_eval_metrics(noted)
    assert (found.selector_fallbacks, found.gate_rate) == (1, 0.5)
    assert step_metrics(noted)[metric_names.OVERVIEW_FALLBACK_RATE] == pytest.approx(1 / 3)
    assert metric_names.OVERVIEW_FALLBACK_RATE not in step_metrics(results)
    assert compute_eval_metrics(results).gate_rate is None
