"""A user's own reward: what it may say, where it is logged, and what its contract test finds."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rewards.test_scorer import GOOD, TASK, make_trajectory
from vz_ray import cli
from vz_ray.config.reward import RewardConfig
from vz_ray.data.episode_record import EpisodeRecord, append_records
from vz_ray.env.task import AnswerType
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.rewards import check_scorers, load_reward_function, score_episode
from vz_ray.rewards.function_check import check_function, make_cases
from vz_ray.utils.errors import UserError

OPEN = replace(TASK, question="What runs?", answer="a brown dog", answer_type=AnswerType.OPEN_ENDED)


def using(name: str, **more: float) -> RewardConfig:
    return RewardConfig(function=f"tests.rewards.user_functions:{name}", **more)  # type: ignore[arg-type]


def test_its_parts_are_added_as_they_are_and_logged_by_name() -> None:
    parts = score_episode(make_trajectory("B", GOOD), TASK, using("brevity"))
    assert parts.extra == {"brevity": 0.25, "turns": -0.2}
    assert parts.total == pytest.approx(1.5 + 0.25 - 0.2)
    assert (parts.accuracy, parts.format, parts.tool) == (1, 1, 1)


def test_with_weights_of_0_it_is_the_whole_reward() -> None:
    parts = score_episode(make_trajectory("B", GOOD), TASK, using("brevity", accuracy=0, format=0, tool=0))
    assert parts.total == pytest.approx(0.05)


def test_its_accuracy_takes_the_place_of_the_projects_own() -> None:
    parts = score_episode(make_trajectory("B", GOOD), replace(TASK, answer="B or C"), using("own_accuracy"))
    assert parts.accuracy == pytest.approx(1 / 3)
    assert parts.extra == {}
    assert parts.tool == 0, "paid only for an answer that is fully right"
    assert parts.total == pytest.approx(0.9 / 3 + 0.1)
    assert score_episode(make_trajectory("b", GOOD), TASK, using("own_accuracy")).total == 1.5


def test_its_accuracy_stands_in_for_a_judge() -> None:
    parts = score_episode(make_trajectory("the brown dog", GOOD), OPEN, using("own_accuracy"))
    assert (parts.valid, parts.accuracy) == (True, pytest.approx(2 / 3))
    assert not score_episode(make_trajectory("the brown dog"), OPEN, using("brevity")).valid, (
        "it gives no accuracy"
    )


def test_it_may_say_that_an_episode_cannot_be_judged() -> None:
    parts = score_episode(make_trajectory(None, status=EpisodeStatus.NO_ANSWER), TASK, using("only_answered"))
    assert (parts.valid, parts.total, parts.note) == (False, 0.0, "own function: nothing to compare")
    assert score_episode(make_trajectory("B"), TASK, using("only_answered")).extra == {
        "length_of_answer": 1.0
    }


def test_a_failed_episode_is_never_shown_to_it() -> None:
    failed = replace(make_trajectory("B"), status=EpisodeStatus.FAILED, error="worker died")
    assert score_episode(failed, TASK, using("raising")).note == "failed: worker died"


BAD = [
    ("raising", "raised KeyError: 'level', on episode 0/t/0#0"),
    ("a_number", "returned float; it must return a mapping"),
    ("none", "returned NoneType"),
    ("waiting", "returned coroutine"),
    ("not_finite", "returned nan as 'iou'; it must be finite"),
    ("infinite", "returned inf as 'iou'; it must be finite"),
    ("text", "returned '1' as 'iou'; it must be a number"),
    ("truth_value", "returned True as 'iou'; it must be a number"),
    ("an_array", "as 'iou'; it must be a number"),
    ("no_name", "named a part 1;"),
    ("spaced", "named a part 'my part'; use lower case"),
    ("upper", "named a part 'IoU'; use lower case"),
    ("taken", "named a part 'format', which the project has itself"),
    ("too_accurate", "returned 1.5 as 'accuracy'; it must lie between 0 and 1"),
]


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize(("name", "message"), BAD)
def test_what_is_no_set_of_parts_stops_the_run_with_the_name_and_the_fault(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        score_episode(make_trajectory("B"), TASK, using(name))
    assert f"'tests.rewards.user_functions:{name}'" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tests.rewards.missing:x", r"ModuleNotFoundError.*put its directory on PYTHONPATH"),
        ("gone_package.rewards:x", r"put its directory on PYTHONPATH"),
        (
            "tests.rewards.user_functions:brevty",
            r"has no function 'brevty'; its functions are brevity, own_accuracy",
        ),
        ("tests.rewards.user_functions:NOT_A_FUNCTION", "has no function 'NOT_A_FUNCTION'"),
        ("tests.rewards.user_functions:two_arguments", r"cannot be called with \(trajectory, task, parts\)"),
        ("tests.rewards.user_functions", "write it as package.module:name"),
    ],
)
def test_a_function_that_is_not_there_is_said_so(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward_function(path)


def test_a_module_that_cannot_be_imported_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_rewards.py").write_text("import gone_dependency\n")
    (tmp_path / "wrong_rewards.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"No module named 'gone_dependency'$"):
        load_reward_function("broken_rewards:x")
    with pytest.raises(UserError, match=r"ZeroDivisionError: division by zero$"):
        load_reward_function("wrong_rewards:x")


def test_a_path_that_cannot_be_one_is_refused_in_the_config() -> None:
    with pytest.raises(ValueError, match=r"reward\.function is 'own\.brevity'; write it as"):
        RewardConfig(function="own.brevity")


def test_what_a_run_needs_is_looked_for_before_it_starts() -> None:
    check_scorers(RewardConfig(), [TASK], "train.json")
    check_scorers(using("own_accuracy"), [TASK, OPEN], "train.json")
    with pytest.raises(UserError, match=r"1 of 2 questions of train\.json need a judge, the first is 't'"):
        check_scorers(RewardConfig(), [TASK, OPEN], "train.json")
    with pytest.raises(UserError, match="has no function"):
        check_scorers(using("gone"), [TASK], "train.json")
    keyed = RewardConfig()
    keyed.judge.model, keyed.judge.base_url, keyed.judge.api_key_env = "m", "http://j/v1", "VZ_RAY_NO_KEY"
    check_scorers(keyed, [TASK], "train.json")
    with pytest.raises(UserError, match="set VZ_RAY_NO_KEY"):
        check_scorers(keyed, [OPEN], "train.json")


# -- the contract test ----------------------------------------------------------


@pytest.mark.parametrize("name", ["brevity", "own_accuracy", "only_answered", "nothing"])
def test_good_functions_keep_the_contract(name: str) -> None:
    trials = check_function(f"tests.rewards.user_functions:{name}", [(make_trajectory("B", GOOD), TASK)])
    assert [trial.violation for trial in trials] == [""] * (len(make_cases()) + 1)


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        *BAD[1:],
        ("raising", "raised KeyError"),
        ("restless", "gave another result for the same episode"),
        ("meddling", "changed the episode or the task"),
    ],
)
def test_bad_functions_break_it(name: str, message: str) -> None:
    trials = check_function(f"tests.rewards.user_functions:{name}")
    assert all(message.partition(", on episode")[0] in trial.violation for trial in trials[:1])
    assert all(trial.violation for trial in trials if trial.parts is None)


def test_the_episodes_it_is_tried_on_are_what_they_are_called() -> None:
    scored = {name: score_episode(played, task, RewardConfig()) for name, played, task in make_cases()}
    assert scored["right, after a zoom"].total == 1.5
    assert scored["right, without a zoom"].total == 1.0
    assert scored["right, after a bad call"].total == 1.4, "a call that was refused is ill-formed"
    assert scored["wrong, after a zoom"].total == pytest.approx(0.1)
    assert scored["unreadable answer"].reason == "unparsed"
    assert scored["no answer"].note == scored["cut off"].note == "no answer"
    assert scored["a number"].accuracy == 1
    assert not scored["open-ended, no judge"].valid
    zoomed = next(played for name, played, _ in make_cases() if name == "right, after a zoom")
    assert len(zoomed.frame_refs) - len(zoomed.prompt.frame_refs) == 8


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vz-ray", "check-reward", *arguments])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_shows_what_each_episode_earns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "000000.jsonl"
    append_records(log, [EpisodeRecord(TASK, make_trajectory("B", GOOD))])
    assert command(monkeypatch, "tests.rewards.user_functions:brevity", "--episodes", str(log)) == 0
    out = capsys.readouterr().out
    assert "brevity 0.25, turns -0.2" in out
    assert "0/t/0#0" in out
    assert out.endswith("tests.rewards.user_functions:brevity: keeps the contract\n")


def test_the_command_fails_for_a_bad_function_and_for_a_file_that_is_no_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command(monkeypatch, "tests.rewards.user_functions:not_finite") == 1
    assert "9 of 9 episodes break the contract" in capsys.readouterr().out
    assert command(monkeypatch, "tests.rewards.user_functions:gone") == 2
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"a": 1}) + "\n")
    for path in (other, tmp_path / "gone.jsonl"):
        assert command(monkeypatch, "tests.rewards.user_functions:brevity", "--episodes", str(path)) == 2
        assert f"{path} is not an episode log" in capsys.readouterr().err
