"""An evaluation log survives interruption and refuses to mix evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.eval.conftest import Make
from vz_ray.data.episode_record import append_records
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.eval.eval_log import EvalLog, read_results
from vz_ray.utils.errors import UserError

IDENTITY = {"weights": 7, "data": "needle-test"}


def test_results_come_back_equal(tmp_path: Path, make: Make) -> None:
    path = tmp_path / "eval" / "rl.jsonl"
    log = EvalLog(path, IDENTITY)
    for result in (make("a"), make("b", events=((1.0, 2.0), (3.0, 4.0)))):
        log.append(result)
    again = EvalLog(path, IDENTITY)
    assert again.records == log.records == read_results(path)
    assert again.completed == {("a", 0), ("b", 0)}


@pytest.mark.parametrize("lost", [1, 40, 400])
def test_a_half_written_line_is_cut_and_played_again(tmp_path: Path, make: Make, lost: int) -> None:
    path = tmp_path / "rl.jsonl"
    log = EvalLog(path, IDENTITY)
    log.append(make("a"))
    log.append(make("b"))
    path.write_bytes(path.read_bytes()[:-lost])
    again = EvalLog(path, IDENTITY)
    assert again.completed == {("a", 0)}
    again.append(make("b"))
    assert read_results(path) == log.records


def test_a_log_that_lost_even_its_header_starts_afresh(tmp_path: Path, make: Make) -> None:
    path = tmp_path / "rl.jsonl"
    path.write_bytes(b'{"evalua')
    EvalLog(path, IDENTITY).append(make("a"))
    assert EvalLog(path, IDENTITY).completed == {("a", 0)}


def test_results_of_other_weights_are_refused(tmp_path: Path) -> None:
    EvalLog(tmp_path / "rl.jsonl", IDENTITY)
    with pytest.raises(UserError, match=r"another weights \(7 there, 8 now\)"):
        EvalLog(tmp_path / "rl.jsonl", {**IDENTITY, "weights": 8})


def test_a_task_is_logged_once(tmp_path: Path, make: Make) -> None:
    log = EvalLog(tmp_path / "rl.jsonl", IDENTITY)
    log.append(make("a"))
    with pytest.raises(ValueError, match="already has task 'a'"):
        log.append(make("a", right=False))


def test_a_failed_episode_is_played_again_and_the_later_line_counts(tmp_path: Path, make: Make) -> None:
    path = tmp_path / "rl.jsonl"
    log = EvalLog(path, IDENTITY)
    log.append(make("a", status=EpisodeStatus.FAILED, valid=False))
    log.append(make("b"))
    again = EvalLog(path, IDENTITY)
    assert again.completed == {("b", 0)}
    again.append(make("a"))
    assert again.completed == {("a", 0), ("b", 0)}
    assert read_results(path) == again.records == [make("a"), make("b")]


def test_a_question_whose_judge_failed_is_asked_again_and_one_without_a_judge_is_not(
    tmp_path: Path, make: Make
) -> None:
    log = EvalLog(tmp_path / "rl.jsonl", IDENTITY)
    log.append(make("a", valid=False, note="judge timeout: 30 s"))
    log.append(make("b", valid=False, note="no judge: open_ended answers need reward.judge.model"))
    log.append(make("c", right=False, note="unparsed: 'judge'"))
    assert EvalLog(log.path, IDENTITY).completed == {("b", 0), ("c", 0)}
    log.append(make("a"))
    assert EvalLog(log.path, IDENTITY).completed == {("a", 0), ("b", 0), ("c", 0)}


def test_identities_are_compared_as_written(tmp_path: Path) -> None:
    EvalLog(tmp_path / "rl.jsonl", {"sizes": (1, 2)})
    assert EvalLog(tmp_path / "rl.jsonl", {"sizes": [1, 2]}).records == []


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, make: Make) -> None:
    path = tmp_path / "rl.jsonl"
    EvalLog(path, IDENTITY).append(make("a"))
    path.write_bytes(path.read_bytes() + b"garbage\n")
    with pytest.raises(ValueError, match=r"rl\.jsonl, line 3"):
        EvalLog(path, IDENTITY)


def test_an_episode_log_reads_the_same_way(tmp_path: Path, make: Make) -> None:
    records = [make("a", stage="train"), make("a", stage="train")]
    append_records(tmp_path / "episodes" / "0.jsonl", records)
    assert read_results(tmp_path / "episodes" / "0.jsonl") == records
