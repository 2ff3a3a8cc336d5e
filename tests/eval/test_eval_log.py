"""Evaluation logs resume after an interruption and reject results of another evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.eval.conftest import MakeResult
from vz_ray.data.episode_record import append_records
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.eval.eval_log import EvalLog, read_results
from vz_ray.utils.errors import UserError

IDENTITY = {"weights": 7, "data": "needle-test"}


def test_results_round_trip(tmp_path: Path, make_result: MakeResult) -> None:
    path = tmp_path / "eval" / "rl.jsonl"
    log = EvalLog(path, IDENTITY)
    for result in (make_result("a"), make_result("b", events=((1.0, 2.0), (3.0, 4.0)))):
        log.append(result)
    reopened = EvalLog(path, IDENTITY)
    assert reopened.records == log.records == read_results(path)
    assert reopened.completed == {("a", 0), ("b", 0)}


@pytest.mark.parametrize("lost", [1, 40, 400])
def test_truncated_last_line_is_dropped(tmp_path: Path, make_result: MakeResult, lost: int) -> None:
    path = tmp_path / "rl.jsonl"
    log = EvalLog(path, IDENTITY)
    log.append(make_result("a"))
    log.append(make_result("b"))
    path.write_bytes(path.read_bytes()[:-lost])
    reopened = EvalLog(path, IDENTITY)
    assert reopened.completed == {("a", 0)}
    reopened.append(make_result("b"))
    assert read_results(path) == log.records


def test_log_with_truncated_header_starts_over(tmp_path: Path, make_result: MakeResult) -> None:
    path = tmp_path / "rl.jsonl"
    path.write_bytes(b'{"evalua')
    EvalLog(path, IDENTITY).append(make_result("a"))
    assert EvalLog(path, IDENTITY).completed == {("a", 0)}


def test_log_of_other_weights_raises(tmp_path: Path) -> None:
    EvalLog(tmp_path / "rl.jsonl", IDENTITY)
    with pytest.raises(UserError, match=r"another weights \(7 there, 8 now\)"):
        EvalLog(tmp_path / "rl.jsonl", {**IDENTITY, "weights": 8})


def test_duplicate_task_raises(tmp_path: Path, make_result: MakeResult) -> None:
    log = EvalLog(tmp_path / "rl.jsonl", IDENTITY)
    log.append(make_result("a"))
    with pytest.raises(ValueError, match="already has task 'a'"):
        log.append(make_result("a", correct=False))


def test_failed_episode_is_retried_and_last_line_wins(tmp_path: Path, make_result: MakeResult) -> None:
    path = tmp_path / "rl.jsonl"
    log = EvalLog(path, IDENTITY)
    log.append(make_result("a", status=EpisodeStatus.FAILED, valid=False))
    log.append(make_result("b"))
    reopened = EvalLog(path, IDENTITY)
    assert reopened.completed == {("b", 0)}
    reopened.append(make_result("a"))
    assert reopened.completed == {("a", 0), ("b", 0)}
    assert read_results(path) == reopened.records == [make_result("a"), make_result("b")]


def test_judge_failure_is_retried_but_missing_judge_is_not(tmp_path: Path, make_result: MakeResult) -> None:
    log = EvalLog(tmp_path / "rl.jsonl", IDENTITY)
    log.append(make_result("a", valid=False, note="judge timeout: 30 s"))
    log.append(make_result("b", valid=False, note="no judge: open_ended answers need reward.judge.model"))
    log.append(make_result("c", correct=False, note="unparsed: 'judge'"))
    assert EvalLog(log.path, IDENTITY).completed == {("b", 0), ("c", 0)}
    log.append(make_result("a"))
    assert EvalLog(log.path, IDENTITY).completed == {("a", 0), ("b", 0), ("c", 0)}


def test_identities_are_compared_as_json(tmp_path: Path) -> None:
    EvalLog(tmp_path / "rl.jsonl", {"sizes": (1, 2)})
    assert EvalLog(tmp_path / "rl.jsonl", {"sizes": [1, 2]}).records == []


def test_malformed_line_raises_with_line_number(tmp_path: Path, make_result: MakeResult) -> None:
    path = tmp_path / "rl.jsonl"
    EvalLog(path, IDENTITY).append(make_result("a"))
    path.write_bytes(path.read_bytes() + b"garbage\n")
    with pytest.raises(ValueError, match=r"rl\.jsonl, line 3"):
        EvalLog(path, IDENTITY)


def test_read_results_accepts_episode_logs(tmp_path: Path, make_result: MakeResult) -> None:
    records = [make_result("a", stage="train"), make_result("a", stage="train")]
    append_records(tmp_path / "episodes" / "0.jsonl", records)
    assert read_results(tmp_path / "episodes" / "0.jsonl") == records
