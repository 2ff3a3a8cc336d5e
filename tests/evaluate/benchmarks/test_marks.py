"""Strict and lenient reading of answers; what cannot be read is wrong and counted, never guessed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.evaluate.benchmarks.making import played
from vz_ray.data.task import AnswerType, Task
from vz_ray.episode.trajectory import RewardParts, Status
from vz_ray.evaluate.benchmarks import Benchmark, Reading, Verdict, mark_all, scored
from vz_ray.evaluate.benchmarks.benchmark import ask, lettered
from vz_ray.evaluate.benchmarks.figures import accuracy, macro, mean, table_of

TASK = Task("t", "v.mp4", "Which?\nA. disc\nB. cross\nC. ring", "B")


def marks(task: Task, text: str, **more: Any) -> tuple[tuple[str, float], tuple[str, float]]:
    benchmark = Benchmark("b", (task,), lambda samples: [accuracy(samples)])
    (found,) = mark_all(benchmark, [played(task, text, **more)])
    return (found.strict.reading, found.strict.score), (found.lenient.reading, found.lenient.score)


READ, UNPARSED, NO_ANSWER = Reading.READ, Reading.UNPARSED, Reading.NO_ANSWER


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
    benchmark = Benchmark("b", (TASK,), lambda samples: [accuracy(samples)])
    results = [played(TASK, "<answer>B</answer>"), played(TASK, "", status=Status.FAILED, turns=())]
    marked = mark_all(benchmark, results)
    assert [sample.strict.reading for sample in marked] == [READ, Reading.FAILED]
    assert benchmark.figures(scored(marked, lambda sample: sample.strict))[0].count == 1


def test_a_judged_answer_is_what_the_rollout_workers_judge_said() -> None:
    task = Task("t", "v.mp4", "What happens?", "It rains.", AnswerType.OPEN_ENDED)
    benchmark = Benchmark("b", (task,), lambda samples: [accuracy(samples)])
    rewards = [
        RewardParts(1.0, 1.0, 1.0, 0.0),
        RewardParts(0.0, 0.0, 1.0, 0.0),
        RewardParts(0.0, 0.0, 0.0, 0.0, valid=False, note="no judge"),
        None,
    ]
    results = [played(task, "<answer>Rain</answer>", reward=reward) for reward in rewards]
    found = [(sample.strict.reading, sample.strict.score) for sample in mark_all(benchmark, results)]
    assert found == [(READ, 1), (READ, 0), (Reading.UNJUDGED, 0), (Reading.UNJUDGED, 0)]


def test_any_judge_may_take_its_place_and_no_answer_is_wrong_without_asking_it() -> None:
    task = Task("t", "v.mp4", "What happens?", "It rains.", AnswerType.GRADED)
    benchmark = Benchmark("b", (task,), lambda samples: [accuracy(samples)])
    asked = []

    def judge(result: Any) -> Verdict:
        asked.append(result.trajectory.answer)
        return Verdict(True, 4.0)

    results = [played(task, "<answer>Rain</answer>"), played(task, "hm")]
    one, two = mark_all(benchmark, results, judge)
    assert (one.strict.score, dict(one.strict.detail)) == (1.0, {"grade": 4.0})
    assert (two.strict.reading, dict(two.strict.detail)) == (NO_ANSWER, {"grade": 0.0})
    assert asked == ["Rain"]


def test_options_may_bring_their_letters() -> None:
    assert (
        lettered(["A. disc", "B. cross"])
        == lettered(["(A) disc", "(B) cross"])
        == {"A": "disc", "B": "cross"}
    )
    assert lettered(["A disc", "B cross"]) == {"A": "A disc", "B": "B cross"}
    assert lettered(["A. disc", "cross"]) == {"A": "A. disc", "B": "cross"}
    assert ask(" Which? ", lettered(["disc", "cross"])) == "Which?\nA. disc\nB. cross"
    with pytest.raises(ValueError, match="27 options"):
        lettered([str(i) for i in range(27)])


def test_macro_counts_groups_and_mean_of_nothing_is_none() -> None:
    benchmark = Benchmark("b", (), lambda samples: [])
    results = [played(TASK, f"<answer>{said}</answer>") for said in "BBBA"]
    samples = scored(mark_all(benchmark, results), lambda sample: sample.strict)
    groups = table_of(samples, "half", lambda task: ["one", "two"])
    assert [(figure.name, figure.value, figure.count) for figure in groups] == [
        ("one", 0.75, 4),
        ("two", 0.75, 4),
    ]
    assert macro([mean([1.0], "a"), mean([0.0, 0.0, 0.0], "b"), mean([], "c")], "M").value == 0.5
    assert macro([], "M").value is None
