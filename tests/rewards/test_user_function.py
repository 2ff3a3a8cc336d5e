"""User-defined reward functions and their contract check."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command_line import run_command
from tests.rewards.test_scorer import GOOD, TASK, make_trajectory
from vz_ray.config.reward import RewardConfig
from vz_ray.data.episode_record import EpisodeRecord, append_records
from vz_ray.env.task import AnswerType
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.rewards import check_scorers, load_reward_function, score_episode
from vz_ray.rewards.function_check import check_function, make_cases
from vz_ray.utils.errors import UserError

OPEN = replace(TASK, question="What runs?", answer="a brown dog", answer_type=AnswerType.OPEN_ENDED)


def config_with(name: str, **more: float) -> RewardConfig:
    return RewardConfig(function=f"tests.rewards.user_functions:{name}", **more)  # type: ignore[arg-type]


def test_user_parts_are_added_unweighted() -> None:
    parts = score_episode(make_trajectory("B", GOOD), TASK, config_with("brevity"))
    assert parts.extra == {"brevity": 0.25, "turns": -0.2}
    assert parts.total == pytest.approx(1.5 + 0.25 - 0.2)
    assert (parts.accuracy, parts.format, parts.tool) == (1, 1, 1)


def test_zero_weights_leave_user_parts_only() -> None:
    parts = score_episode(make_trajectory("B", GOOD), TASK, config_with("brevity", accuracy=0, format=0, tool=0))
    assert parts.total == pytest.approx(0.05)


def test_user_accuracy_replaces_builtin() -> None:
    parts = score_episode(
        make_trajectory("B", GOOD), replace(TASK, answer="B or C"), config_with("word_overlap_accuracy")
    )
    assert parts.accuracy == pytest.approx(1 / 3)
    assert parts.extra == {}
    assert parts.tool == 0, "requires full accuracy"
    assert parts.total == pytest.approx(0.9 / 3 + 0.1)
    assert score_episode(make_trajectory("b", GOOD), TASK, config_with("word_overlap_accuracy")).total == 1.5


def test_user_accuracy_replaces_judge() -> None:
    parts = score_episode(make_trajectory("the brown dog", GOOD), OPEN, config_with("word_overlap_accuracy"))
    assert (parts.valid, parts.accuracy) == (True, pytest.approx(2 / 3))
    without_accuracy = score_episode(make_trajectory("the brown dog"), OPEN, config_with("brevity"))
    assert not without_accuracy.valid


def test_invalid_episode_exception_invalidates_sample() -> None:
    parts = score_episode(make_trajectory(None, status=EpisodeStatus.NO_ANSWER), TASK, config_with("only_answered"))
    assert (parts.valid, parts.total, parts.note) == (False, 0.0, "user function: nothing to compare")
    assert score_episode(make_trajectory("B"), TASK, config_with("only_answered")).extra == {"answer_chars": 1.0}


def test_failed_episode_skips_user_function() -> None:
    failed = replace(make_trajectory("B"), status=EpisodeStatus.FAILED, error="worker died")
    assert score_episode(failed, TASK, config_with("raising")).note == "failed: worker died"


INVALID_FUNCTIONS = [
    ("raising", "raised KeyError: 'level', on episode 0/t/0#0"),
    ("number", "returned float; it must return a mapping"),
    ("none", "returned NoneType"),
    ("coroutine_function", "returned coroutine"),
    ("not_finite", "returned nan for 'iou'; it must be finite"),
    ("infinite", "returned inf for 'iou'; it must be finite"),
    ("text", "returned '1' for 'iou'; it must be a number"),
    ("boolean", "returned True for 'iou'; it must be a number"),
    ("array", "for 'iou'; it must be a number"),
    ("non_string_name", "named a part 1;"),
    ("name_with_space", "named a part 'my part'; use lower-case"),
    ("uppercase_name", "named a part 'IoU'; use lower-case"),
    ("reserved_name", "named a part 'format', which is reserved"),
    ("accuracy_out_of_range", "returned 1.5 for 'accuracy'; it must be between 0 and 1"),
]


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize(("name", "message"), INVALID_FUNCTIONS)
def test_invalid_parts_raise_user_error(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        score_episode(make_trajectory("B"), TASK, config_with(name))
    assert f"'tests.rewards.user_functions:{name}'" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tests.rewards.missing:x", r"ModuleNotFoundError.*add its directory to PYTHONPATH"),
        ("missing_package.rewards:x", r"add its directory to PYTHONPATH"),
        (
            "tests.rewards.user_functions:brevty",
            r"has no function 'brevty'; its functions are brevity, word_overlap_accuracy",
        ),
        ("tests.rewards.user_functions:NOT_A_FUNCTION", "has no function 'NOT_A_FUNCTION'"),
        ("tests.rewards.user_functions:two_arguments", r"cannot be called with \(trajectory, task, parts\)"),
        ("tests.rewards.user_functions", "write it as package.module:name"),
    ],
)
def test_missing_function_is_reported(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward_function(path)


def test_failing_import_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_rewards.py").write_text("import missing_dependency\n")
    (tmp_path / "wrong_rewards.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"No module named 'missing_dependency'$"):
        load_reward_function("broken_rewards:x")
    with pytest.raises(UserError, match=r"ZeroDivisionError: division by zero$"):
        load_reward_function("wrong_rewards:x")


def test_malformed_function_path_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"function is 'own\.brevity'; write it as"):
        RewardConfig(function="own.brevity")


def test_preflight_checks_scorers() -> None:
    check_scorers(RewardConfig(), [TASK], "train.json")
    check_scorers(config_with("word_overlap_accuracy"), [TASK, OPEN], "train.json")
    with pytest.raises(UserError, match=r"1 of 2 questions of train\.json need a judge \(first: 't'\)"):
        check_scorers(RewardConfig(), [TASK, OPEN], "train.json")
    with pytest.raises(UserError, match="has no function"):
        check_scorers(config_with("missing"), [TASK], "train.json")
    keyed = RewardConfig()
    keyed.judge.model, keyed.judge.base_url, keyed.judge.api_key_env = "m", "http://j/v1", "VZ_RAY_NO_KEY"
    check_scorers(keyed, [TASK], "train.json")
    with pytest.raises(UserError, match="set VZ_RAY_NO_KEY"):
        check_scorers(keyed, [OPEN], "train.json")


# -- contract check -------------------------------------------------------------


@pytest.mark.parametrize("name", ["brevity", "word_overlap_accuracy", "only_answered", "no_parts"])
def test_valid_functions_pass_check(name: str) -> None:
    trials = check_function(f"tests.rewards.user_functions:{name}", [(make_trajectory("B", GOOD), TASK)])
    assert [trial.violation for trial in trials] == [""] * (len(make_cases()) + 1)


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        *INVALID_FUNCTIONS[1:],
        ("raising", "raised KeyError"),
        ("nondeterministic", "returned another result for the same episode"),
        ("mutating", "changed the episode or the task"),
    ],
)
def test_invalid_functions_fail_check(name: str, message: str) -> None:
    trials = check_function(f"tests.rewards.user_functions:{name}")
    assert all(message.partition(", on episode")[0] in trial.violation for trial in trials[:1])
    assert all(trial.violation for trial in trials if trial.parts is None)


def test_sample_episodes_match_their_names() -> None:
    scored = {name: score_episode(episode, task, RewardConfig()) for name, episode, task in make_cases()}
    assert scored["right, after a zoom"].total == 1.5
    assert scored["right, without a zoom"].total == 1.0
    assert scored["right, after an invalid call"].total == 1.4, "an invalid call breaks the format"
    assert scored["wrong, after a zoom"].total == pytest.approx(0.1)
    assert scored["unparsable answer"].reason == "unparsed"
    assert scored["no answer"].note == scored["truncated"].note == "no answer"
    assert scored["a number"].accuracy == 1
    assert not scored["open-ended, no judge"].valid
    zoomed = next(episode for name, episode, _ in make_cases() if name == "right, after a zoom")
    assert len(zoomed.frame_refs) - len(zoomed.prompt.frame_refs) == 8


def run_check_reward(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setenv("COLUMNS", "160")
    return run_command(monkeypatch, "check-reward", *arguments)


def test_command_prints_reward_per_episode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "000000.jsonl"
    append_records(log, [EpisodeRecord(TASK, make_trajectory("B", GOOD))])
    assert run_check_reward(monkeypatch, "tests.rewards.user_functions:brevity", "--episodes", str(log)) == 0
    out = capsys.readouterr().out
    assert "brevity 0.25, turns -0.2" in out
    assert "0/t/0#0" in out
    assert out.endswith("tests.rewards.user_functions:brevity: keeps the contract\n")


def test_command_reads_newest_log_of_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["tests.rewards.user_functions:brevity", "--episodes", str(tmp_path)]
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time": 1.0}\n')
    (tmp_path / "episodes").mkdir()
    assert run_check_reward(monkeypatch, *command) == 2
    assert f"{tmp_path} has no episodes: there is no *.jsonl in {tmp_path}/episodes/" in capsys.readouterr().err
    for step in (0, 1):
        log = tmp_path / f"episodes/{step:06d}.jsonl"
        trajectory = make_trajectory("B", GOOD)
        trajectory = replace(trajectory, id=replace(trajectory.id, step=step))
        append_records(log, [EpisodeRecord(TASK, trajectory)])
        os.utime(log, (1, 1))
    assert run_check_reward(monkeypatch, *command) == 0
    out = capsys.readouterr().out
    assert "1/t/0#0" in out
    assert "0/t/0#0" not in out


def test_command_fails_for_invalid_function_or_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_check_reward(monkeypatch, "tests.rewards.user_functions:not_finite") == 1
    assert "9 of 9 episodes break the contract" in capsys.readouterr().out
    assert run_check_reward(monkeypatch, "tests.rewards.user_functions:missing") == 2
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"a": 1}) + "\n")
    for path in (other, tmp_path / "missing.jsonl"):
        assert run_check_reward(monkeypatch, "tests.rewards.user_functions:brevity", "--episodes", str(path)) == 2
        assert f"{path} is not an episode log" in capsys.readouterr().err
