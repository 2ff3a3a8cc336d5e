"""Rows parsed from raw log lines match the trajectories."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.viewer.run_factory import LightEpisode, light_line, light_record
from vz_ray.data.episode_record import EpisodeRecord, record_to_dict
from vz_ray.env.trajectory import EpisodeStatus, RejectedZoom, RewardParts, TokenContext, ZoomErrorKind
from vz_ray.eval.eval_log import read_results
from vz_ray.eval.failure_counts import classify_result
from vz_ray.report.viewer.episode_row import (
    MAX_TEXT_CHARS,
    EpisodeParseError,
    EpisodeRow,
    episode_row,
    parse_line,
)

SMALL = LightEpisode(frames=4, tokens=4)


def columns(record: EpisodeRecord) -> EpisodeRow:
    return episode_row(json.loads(json.dumps(record_to_dict(record))))


def assert_same(record: EpisodeRecord) -> None:
    found, played = columns(record), record.trajectory
    failure = classify_result(record) if played.reward else None
    assert found.failure == (failure.value if failure else "")
    assert (found.zooms, found.frames, found.turns) == (
        len(played.zooms),
        len(played.frame_refs),
        len(played.turns),
    )
    assert found.refused == played.num_zoom_calls - len(played.zooms)
    assert (found.task, found.kind, found.stage, found.step) == (
        record.task.task_id,
        record.task.kind,
        record.stage,
        record.step,
    )


def test_real_episodes_match_the_eval_classification(made_run: Path) -> None:
    logs = [*made_run.glob("episodes/*.jsonl"), made_run / "eval" / "rl.jsonl"]
    records = [record for log in logs for record in read_results(log)]
    assert len({columns(record).failure for record in records}) > 2
    for record in records:
        assert_same(record)


@pytest.mark.parametrize("status", list(EpisodeStatus))
@pytest.mark.parametrize("number", range(6))
def test_every_status_matches_the_eval_classification(status: EpisodeStatus, number: int) -> None:
    record = light_record(number, SMALL)
    refused = replace(
        record.trajectory.turns[-1],
        zoom=RejectedZoom(ZoomErrorKind.EMPTY, "empty"),
        observation=TokenContext((3,)),
    )
    for turns in (record.trajectory.turns, (refused, *record.trajectory.turns), (refused,)):
        assert_same(replace(record, trajectory=replace(record.trajectory, status=status, turns=turns)))


def test_unscored_episode_is_neither_right_nor_wrong() -> None:
    record = light_record(0, SMALL)
    for reward in (None, RewardParts(0.0, 0.0, 0.0, 0.0, valid=False, note="judge timeout")):
        found = columns(replace(record, trajectory=replace(record.trajectory, reward=reward)))
        assert (found.outcome, found.failure, found.reward) == ("unjudged", "", None)


def test_long_text_is_cut() -> None:
    record = light_record(0, SMALL)
    long = replace(record, task=replace(record.task, question="why " * 10**6))
    assert len(columns(long).question) == MAX_TEXT_CHARS


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
        (changed("trajectory.v", 1), "format version 1; this vz_ray reads version 3"),
        (changed("trajectory.status", "asleep"), "not an episode: 'asleep' is not a valid EpisodeStatus"),
        (changed("trajectory.turns", 3), "not an episode: "),
        (changed("advantage", float("nan")), "NaN is not a valid JSON number"),
        (changed("trajectory.seconds", float("inf")), "Infinity is not"),
        (changed("trajectory.seconds", 1.5).replace(b"1.5", b"1e999"), "seconds is inf; it must be finite"),
    ],
    ids=range(12),
)
def test_invalid_line_has_a_reason(line: bytes, why: str) -> None:
    with pytest.raises(EpisodeParseError) as raised:
        episode_row(parse_line(line) or {})
    assert str(raised.value).startswith(why)


def test_header_line_is_skipped() -> None:
    assert parse_line(b'{"evaluation": {"stage": "rl"}}') is None
