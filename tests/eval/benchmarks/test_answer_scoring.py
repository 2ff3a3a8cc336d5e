"""Strict and lenient reading of answers; what cannot be read is wrong and counted, never guessed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.eval.benchmarks.factories import played
from vz_ray.env.task import AnswerType, Task
from vz_ray.env.trajectory import EpisodeStatus, RewardParts
from vz_ray.eval.benchmarks import AnswerStatus, Benchmark, JudgedAnswer, score_results, select_scores
from vz_ray.eval.benchmarks.aggregation import accuracy_metric, accuracy_table, macro_average, mean_metric
from vz_ray.eval.benchmarks.benchmark import format_question, letter_options

TASK = Task("t", "v.mp4", "Which?\nA. disc\nB. cross\nC. ring", "B")


def marks(task: Task, text: str, **more: Any) -> tuple[tuple[str, float], tuple[str, float]]:
    benchmark = Benchmark("b", (task,), lambda samples: [accuracy_metric(samples)])
    (found,) = score_results(benchmark, [played(task, text, **more)])
    return (found.strict.status, found.strict.score), (found.lenient.status, found.lenient.score)


READ, UNPARSED, NO_ANSWER = AnswerStatus.PARSED, AnswerStatus.UNPARSED, AnswerStatus.NO_ANSWER


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("<think>A?</think><answer>B</answer>", (READ, 1), (READ, 1)),
        ("<think>B</think><answer>A</answer> I mean B", (READ, 0), (READ, 0)),
        ("<answer>I am not sure</answer> The answer is B.", (UNPARSED, 0), (READ, 1)),
        ("<think>it is B</think>", (NO_ANSWER, 0), (NO_ANSWER, 0)),
        ("<think>it is A</think>\nSo it flashed.\nB", (NO_ANSWER, 0), (READ, 1)),
        ("<think>x</think>The best option is (C)", (NO_ANSWER, 0), (READ, 0)),
        ("cross", (NO_ANSWER, 0), (READ, 1)),
        ("It might be A or B.", (NO_ANSWER, 0), (NO_ANSWER, 0)),
        ("<think>never closed, the answer is B", (NO_ANSWER, 0), (NO_ANSWER, 0)),
        ('<video_zoom>{"segment": [1, 2], "fps": 1}</video_zoom>', (NO_ANSWER, 0), (NO_ANSWER, 0)),
        ("<answer>D</answer>", (UNPARSED, 0), (UNPARSED, 0)),
        ("", (NO_ANSWER, 0), (NO_ANSWER, 0)),
    ],
)
def test_lenient_reads_the_last_turn_only_where_the_span_says_nothing(
    text: str, strict: tuple[str, float], lenient: tuple[str, float]
) -> None:
    assert marks(TASK, text) == (strict, lenient)


@pytest.mark.parametrize(
    ("truth", "said", "mark"),
    [
        ("3", "three times", (READ, 1)),
        ("3", "several", (UNPARSED, 0)),
        ("2/3", "0.5", (READ, 0)),
    ],
)
def test_numbers(truth: str, said: str, mark: tuple[str, float]) -> None:
    task = Task("t", "v.mp4", "How many?", truth, AnswerType.NUMBER)
    assert marks(task, f"<answer>{said}</answer>")[0] == mark


def test_an_episode_that_failed_is_left_out_not_wrong() -> None:
    benchmark = Benchmark("b", (TASK,), lambda samples: [accuracy_metric(samples)])
    results = [played(TASK, "<answer>B</answer>"), played(TASK, "", status=EpisodeStatus.FAILED, turns=())]
    marked = score_results(benchmark, results)
    assert [sample.strict.status for sample in marked] == [READ, AnswerStatus.FAILED]
    assert benchmark.compute_metrics(select_scores(marked, lambda sample: sample.strict))[0].count == 1


def test_a_judged_answer_is_what_the_rollout_workers_judge_said() -> None:
    task = Task("t", "v.mp4", "What happens?", "It rains.", AnswerType.OPEN_ENDED)
    benchmark = Benchmark("b", (task,), lambda samples: [accuracy_metric(samples)])
    rewards = [
        RewardParts(1.0, 1.0, 1.0, 0.0),
        RewardParts(0.0, 0.0, 1.0, 0.0),
        RewardParts(0.0, 0.0, 0.0, 0.0, valid=False, note="no judge"),
        None,
    ]
    results = [played(task, "<answer>Rain</answer>", reward=reward) for reward in rewards]
    found = [(sample.strict.status, sample.strict.score) for sample in score_results(benchmark, results)]
    assert found == [(READ, 1), (READ, 0), (AnswerStatus.UNJUDGED, 0), (AnswerStatus.UNJUDGED, 0)]


def test_any_judge_may_take_its_place_and_no_answer_is_wrong_without_asking_it() -> None:
    task = Task("t", "v.mp4", "What happens?", "It rains.", AnswerType.GRADED)
    benchmark = Benchmark("b", (task,), lambda samples: [accuracy_metric(samples)])
    asked = []

    def judge(result: Any) -> JudgedAnswer:
        asked.append(result.trajectory.answer)
        return JudgedAnswer(True, 4.0)

    results = [played(task, "<answer>Rain</answer>"), played(task, "hm")]
    one, two = score_results(benchmark, results, judge)
    assert (one.strict.score, dict(one.strict.detail)) == (1.0, {"grade": 4.0})
    assert (two.strict.status, dict(two.strict.detail)) == (NO_ANSWER, {"grade": 0.0})
    assert asked == ["Rain"]


def test_options_may_bring_their_letters() -> None:
    assert (
        letter_options(["A. disc", "B. cross"])
        == letter_options(["(A) disc", "(B) cross"])
        == {"A": "disc", "B": "cross"}
    )
    assert letter_options(["A disc", "B cross"]) == {"A": "A disc", "B": "B cross"}
    assert letter_options(["A. disc", "cross"]) == {"A": "A. disc", "B": "cross"}
    assert format_question(" Which? ", letter_options(["disc", "cross"])) == "Which?\nA. disc\nB. cross"
    with pytest.raises(ValueError, match="27 options"):
        letter_options([str(i) for i in range(27)])


def test_macro_counts_groups_and_mean_of_nothing_is_none() -> None:
    benchmark = Benchmark("b", (), lambda samples: [])
    results = [played(TASK, f"<answer>{said}</answer>") for said in "BBBA"]
    samples = select_scores(score_results(benchmark, results), lambda sample: sample.strict)
    groups = accuracy_table(samples, "half", lambda task: ["one", "two"])
    assert [(figure.name, figure.value, figure.count) for figure in groups] == [
        ("one", 0.75, 4),
        ("two", 0.75, 4),
    ]
    assert (
        macro_average(
            [mean_metric([1.0], "a"), mean_metric([0.0, 0.0, 0.0], "b"), mean_metric([], "c")], "M"
        ).value
        == 0.5
    )
    assert macro_average([], "M").value is None
