"""Strict and lenient scoring; unparsed answers are wrong and counted, never guessed."""

from __future__ import annotations

import pytest

from tests.eval.benchmarks.factories import episode_result
from vz_ray.env.task import AnswerType, Task
from vz_ray.env.trajectory import EpisodeStatus, RewardParts
from vz_ray.eval.benchmarks import AnswerStatus, Benchmark, score_results, select_scores
from vz_ray.eval.benchmarks.aggregation import accuracy_metric, accuracy_table, macro_average, mean_metric
from vz_ray.eval.benchmarks.benchmark import format_question, letter_options

TASK = Task("t", "v.mp4", "Which?\nA. disc\nB. cross\nC. ring", "B")


def scores(task: Task, text: str) -> tuple[tuple[str, float], tuple[str, float]]:
    """Return status and score of the strict and the lenient score."""
    benchmark = Benchmark("b", (task,), lambda scores: [accuracy_metric(scores)])
    (scored,) = score_results(benchmark, [episode_result(task, text)])
    return (scored.strict.status, scored.strict.score), (scored.lenient.status, scored.lenient.score)


PARSED, UNPARSED, NO_ANSWER = AnswerStatus.PARSED, AnswerStatus.UNPARSED, AnswerStatus.NO_ANSWER


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("<think>A?</think><answer>B</answer>", (PARSED, 1), (PARSED, 1)),
        ("<think>B</think><answer>A</answer> I mean B", (PARSED, 0), (PARSED, 0)),
        ("<answer>I am not sure</answer> The answer is B.", (UNPARSED, 0), (PARSED, 1)),
        ("<think>it is B</think>", (NO_ANSWER, 0), (NO_ANSWER, 0)),
        ("<think>it is A</think>\nSo it flashed.\nB", (NO_ANSWER, 0), (PARSED, 1)),
        ("<think>x</think>The best option is (C)", (NO_ANSWER, 0), (PARSED, 0)),
        ("cross", (NO_ANSWER, 0), (PARSED, 1)),
        ("It might be A or B.", (NO_ANSWER, 0), (NO_ANSWER, 0)),
        ("<think>never closed, the answer is B", (NO_ANSWER, 0), (NO_ANSWER, 0)),
        ('<video_zoom>{"segment": [1, 2], "fps": 1}</video_zoom>', (NO_ANSWER, 0), (NO_ANSWER, 0)),
        ("<answer>D</answer>", (UNPARSED, 0), (UNPARSED, 0)),
        ("", (NO_ANSWER, 0), (NO_ANSWER, 0)),
    ],
)
def test_lenient_scoring_falls_back_to_the_last_turn(
    text: str, strict: tuple[str, float], lenient: tuple[str, float]
) -> None:
    assert scores(TASK, text) == (strict, lenient)


@pytest.mark.parametrize(
    ("reference", "answer", "score"),
    [
        ("3", "three times", (PARSED, 1)),
        ("3", "several", (UNPARSED, 0)),
        ("2/3", "0.5", (PARSED, 0)),
    ],
)
def test_number_answers(reference: str, answer: str, score: tuple[str, float]) -> None:
    task = Task("t", "v.mp4", "How many?", reference, AnswerType.NUMBER)
    assert scores(task, f"<answer>{answer}</answer>")[0] == score


def test_failed_episode_is_excluded_from_metrics() -> None:
    benchmark = Benchmark("b", (TASK,), lambda scores: [accuracy_metric(scores)])
    results = [
        episode_result(TASK, "<answer>B</answer>"),
        episode_result(TASK, "", status=EpisodeStatus.FAILED, turns=()),
    ]
    scored = score_results(benchmark, results)
    assert [result.strict.status for result in scored] == [PARSED, AnswerStatus.FAILED]
    assert benchmark.compute_metrics(select_scores(scored, lambda result: result.strict))[0].count == 1


def test_judged_answer_uses_the_reward() -> None:
    task = Task("t", "v.mp4", "What happens?", "It rains.", AnswerType.OPEN_ENDED)
    benchmark = Benchmark("b", (task,), lambda scores: [accuracy_metric(scores)])
    rewards = [
        RewardParts(1.0, 1.0, 1.0, 0.0),
        RewardParts(0.0, 0.0, 1.0, 0.0),
        RewardParts(0.0, 0.0, 0.0, 0.0, valid=False, note="no judge"),
        None,
    ]
    results = [episode_result(task, "<answer>Rain</answer>", reward=reward) for reward in rewards]
    strict = [(scored.strict.status, scored.strict.score) for scored in score_results(benchmark, results)]
    assert strict == [(PARSED, 1), (PARSED, 0), (AnswerStatus.UNJUDGED, 0), (AnswerStatus.UNJUDGED, 0)]


def test_missing_answer_is_wrong_without_a_verdict() -> None:
    task = Task("t", "v.mp4", "What happens?", "It rains.", AnswerType.GRADED)
    benchmark = Benchmark("b", (task,), lambda scores: [accuracy_metric(scores)])
    reward = RewardParts(1.0, 1.0, 1.0, 0.0, extra={"judge_score": 4.0})
    results = [
        episode_result(task, "<answer>Rain</answer>", reward=reward),
        episode_result(task, "hm", reward=None),
    ]
    answered, unanswered = score_results(benchmark, results)
    assert (answered.strict.score, dict(answered.strict.detail)) == (1.0, {"grade": 4.0})
    assert (unanswered.strict.status, dict(unanswered.strict.detail)) == (NO_ANSWER, {"grade": 0.0})


def test_letter_options_strips_existing_letters() -> None:
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


def test_macro_average_weights_labels_equally() -> None:
    benchmark = Benchmark("b", (), lambda scores: [])
    results = [episode_result(TASK, f"<answer>{letter}</answer>") for letter in "BBBA"]
    scores = select_scores(score_results(benchmark, results), lambda result: result.strict)
    groups = accuracy_table(scores, "half", lambda task: ["one", "two"])
    assert [(metric.name, metric.value, metric.count) for metric in groups] == [
        ("one", 0.75, 4),
        ("two", 0.75, 4),
    ]
    assert (
        macro_average([mean_metric([1.0], "a"), mean_metric([0.0, 0.0, 0.0], "b"), mean_metric([], "c")], "M").value
        == 0.5
    )
    assert macro_average([], "M").value is None
