"""What lists need of a line, taken without building the trajectory, says the same as the trajectory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.browser.making import Light, light_line, light_record
from vz_ray.data.record import EpisodeRecord, record_to_dict
from vz_ray.episode.trajectory import Context, RewardParts, Status, ZoomFault, ZoomRefused
from vz_ray.evaluate.failures import failure_of_result
from vz_ray.evaluate.results import read_results
from vz_ray.report.browser.columns import MOST_TEXT, Columns, NoEpisode, columns_of, parse

SMALL = Light(frames=4, tokens=4)


def columns(record: EpisodeRecord) -> Columns:
    return columns_of(json.loads(json.dumps(record_to_dict(record))))


def assert_same(record: EpisodeRecord) -> None:
    found, played = columns(record), record.trajectory
    failure = failure_of_result(record) if played.reward else None
    assert found.failure == (failure.value if failure else "")
    assert (found.zooms, found.frames, found.turns) == (
        len(played.zooms),
        len(played.refs),
        len(played.turns),
    )
    assert found.refused == played.zooms_tried - len(played.zooms)
    assert (found.task, found.kind, found.stage, found.step) == (
        record.task.task_id,
        record.task.kind,
        record.stage,
        record.step,
    )


def test_real_episodes_are_classified_as_their_evaluation_does(made_run: Path) -> None:
    logs = [*made_run.glob("episodes/*.jsonl"), made_run / "eval" / "rl.jsonl"]
    records = [record for log in logs for record in read_results(log)]
    assert len({columns(record).failure for record in records}) > 2
    for record in records:
        assert_same(record)


@pytest.mark.parametrize("status", list(Status))
@pytest.mark.parametrize("number", range(6))
def test_every_status_is_classified_as_the_evaluation_does(status: Status, number: int) -> None:
    record = light_record(number, SMALL)
    refused = replace(
        record.trajectory.turns[-1], zoom=ZoomRefused(ZoomFault.EMPTY, "empty"), reply=Context((3,))
    )
    for turns in (record.trajectory.turns, (refused, *record.trajectory.turns), (refused,)):
        assert_same(replace(record, trajectory=replace(record.trajectory, status=status, turns=turns)))


def test_an_episode_that_nobody_could_judge_is_neither_right_nor_wrong() -> None:
    record = light_record(0, SMALL)
    for reward in (None, RewardParts(0.0, 0.0, 0.0, 0.0, valid=False, note="judge timeout")):
        found = columns(replace(record, trajectory=replace(record.trajectory, reward=reward)))
        assert (found.outcome, found.failure, found.reward) == ("unjudged", "", None)


def test_a_huge_text_is_kept_in_part() -> None:
    record = light_record(0, SMALL)
    long = replace(record, task=replace(record.task, question="why " * 10**6))
    assert len(columns(long).question) == MOST_TEXT


def changed(path: str, value: object) -> bytes:
    line = json.loads(light_line(0, SMALL))
    *parents, last = path.split(".")
    inner = line
    for name in parents:
        inner = inner[name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(line).encode()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "not JSON"),
        (b"\xff\n", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"a": 1, "b": 2}', "not an episode: 'trajectory' is missing"),
        (changed("task", None), "not an episode: 'task' is missing"),
        (changed("trajectory.v", 1), "format version 1; this vz_ray reads version 2"),
        (changed("trajectory.status", "asleep"), "not an episode: 'asleep' is not a valid Status"),
        (changed("trajectory.turns", 3), "not an episode: "),
        (changed("advantage", float("nan")), "holds NaN, which is no number in JSON"),
        (changed("trajectory.seconds", float("inf")), "holds Infinity"),
        (changed("trajectory.seconds", 1.5).replace(b"1.5", b"1e999"), "seconds is inf: not a finite number"),
    ],
    ids=range(12),
)
def test_a_line_that_is_no_episode_says_why(line: bytes, why: str) -> None:
    with pytest.raises(NoEpisode) as raised:
        columns_of(parse(line) or {})
    assert str(raised.value).startswith(why)


def test_a_header_is_no_episode_and_no_fault() -> None:
    assert parse(b'{"evaluation": {"stage": "rl"}}') is None
