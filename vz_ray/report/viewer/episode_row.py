"""Row of an episode for lists, filters and charts, parsed from its log line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vz_ray.env.failure_modes import EpisodeTrace, classify_failure
from vz_ray.env.serialization import FORMAT_VERSION
from vz_ray.env.trajectory import UNPARSED_NOTE, EpisodeStatus, ZoomErrorKind

Json = dict[str, Any]

MAX_TEXT_CHARS = 2000
"""Maximum length of a question, ground truth or answer in lists and search."""

CORRECT, WRONG, UNSCORED = "right", "wrong", "unjudged"
OUTCOMES = (CORRECT, WRONG, UNSCORED)


class EpisodeParseError(ValueError):
    """A log line is not a readable episode. The message gives the reason."""


@dataclass(frozen=True, slots=True)
class EpisodeRow:
    """Row of one episode.

    Attributes:
        stage: `train` or the name of an evaluation.
        task: Task id; identifies the group together with stage and step.
        sample: Index in the group.
        video: Path or URL of the task's video.
        question, truth, answer: Question, ground truth and answer, cut to `MAX_TEXT_CHARS`.
        status: An `EpisodeStatus`.
        outcome: One of `OUTCOMES`.
        failure: A `FailureMode`; empty for right and unscored episodes.
        reward: Total reward; None if not scored or invalid.
        advantage: Advantage in training; None if the episode was not used.
        zooms: Number of valid zooms.
        refused: Number of rejected zooms.
        frames: Number of frames, including the overview.
    """

    stage: str
    step: int
    task: str
    sample: int
    attempt: int
    video: str
    kind: str
    question: str
    truth: str
    answer: str | None
    status: str
    outcome: str
    failure: str
    reward: float | None
    advantage: float | None
    zooms: int
    refused: int
    frames: int
    turns: int
    seconds: float


def parse_line(line: bytes) -> Json | None:
    """Return the JSON object of a line; None for the header of a log.

    Raises:
        EpisodeParseError: The line is neither.
    """
    try:
        value = _DECODER.decode(line.decode())
    except EpisodeParseError:
        raise
    except (ValueError, RecursionError) as error:
        raise EpisodeParseError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise EpisodeParseError("not a JSON object")
    if len(value) == 1 and "trajectory" not in value and isinstance(next(iter(value.values())), dict):
        return None
    return value


def _reject_constant(constant: str) -> Any:
    raise EpisodeParseError(f"{constant} is not a valid JSON number")


_DECODER = json.JSONDecoder(parse_constant=_reject_constant)
"""Shared, because `json.loads` with arguments creates a decoder per call."""


def episode_row(value: Json) -> EpisodeRow:
    """Return the row of an episode's JSON object.

    Raises:
        EpisodeParseError: A field is missing or invalid, or the format version differs.
    """
    try:
        version = value["trajectory"].get("v")
        if version != FORMAT_VERSION:
            raise EpisodeParseError(f"format version {version!r}; this vz_ray reads version {FORMAT_VERSION}")
        return _make_row(value, value["task"], value["trajectory"])
    except EpisodeParseError:
        raise
    except KeyError as error:
        raise EpisodeParseError(f"not an episode: {error.args[0]!r} is missing") from error
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise EpisodeParseError(f"not an episode: {error}") from error


def _make_row(value: Json, task: Json, trajectory: Json) -> EpisodeRow:
    calls = [turn["zoom"] for turn in trajectory["turns"]]
    zooms = [(call["start_s"], call["end_s"]) for call in calls if call and "error" not in call]
    errors = [ZoomErrorKind(call["error"]) for call in calls if call and "error" in call]
    times = [ref[1] for ref in _refs(trajectory)]
    status, reward = EpisodeStatus(trajectory["status"]), trajectory["reward"]
    outcome = _outcome(reward, status)
    trace = EpisodeTrace(
        status, zooms, errors, bool(calls) and calls[-1] is not None, times,
        [(start, end) for start, end in task["evidence_spans"]],
    )  # fmt: skip
    failure = None
    if outcome != UNSCORED or status is EpisodeStatus.FAILED:
        unparsed = bool(reward) and reward["note"].startswith(UNPARSED_NOTE)
        failure = classify_failure(trace, correct=outcome == CORRECT, unparsed=unparsed)
    return EpisodeRow(
        stage=str(value["stage"]),
        step=int(value["step"]),
        task=str(task["task_id"]),
        sample=int(trajectory["id"]["sample"]),
        attempt=int(trajectory["id"]["attempt"]),
        video=str(task["video"]),
        kind=str(task["kind"]),
        question=_cut(task["question"]),
        truth=_cut(task["answer"]),
        answer=None if trajectory["answer"] is None else _cut(trajectory["answer"]),
        status=status.value,
        outcome=outcome,
        failure=failure.value if failure else "",
        reward=_finite_number(reward["total"], "reward") if reward and reward["valid"] else None,
        advantage=None if value["advantage"] is None else _finite_number(value["advantage"], "advantage"),
        zooms=len(zooms),
        refused=len(errors),
        frames=len(times),
        turns=len(calls),
        seconds=_finite_number(trajectory["seconds"], "seconds"),
    )


def _outcome(reward: Json | None, status: EpisodeStatus) -> str:
    if reward is None or not reward["valid"] or status is EpisodeStatus.FAILED:
        return UNSCORED
    return CORRECT if reward["accuracy"] == 1 else WRONG


def _refs(trajectory: Json) -> Iterator[list[Any]]:
    """Yield all frames in order: `[index into frame_table, pts_s, digest]`."""
    yield from trajectory["prompt"]["refs"]
    for turn in trajectory["turns"]:
        if turn["observation"] is not None:
            yield from turn["observation"]["refs"]


def _cut(text: object) -> str:
    return str(text)[:MAX_TEXT_CHARS]


def _finite_number(value: Any, name: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise EpisodeParseError(f"{name} is {number}; it must be finite")
    return number
