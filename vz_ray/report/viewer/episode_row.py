"""What lists, filters and charts need of an episode: a few small values of its line."""

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
"""Characters of a question, truth or answer that are kept for lists and search."""

CORRECT, WRONG, UNSCORED = "right", "wrong", "unjudged"
OUTCOMES = (CORRECT, WRONG, UNSCORED)


class EpisodeParseError(ValueError):
    """A line of a log that holds no episode that this code can read; says why."""


@dataclass(frozen=True, slots=True)
class EpisodeRow:
    """One episode as a list shows it.

    Attributes:
        stage: Where it was played, `train` or the name of an evaluation.
        step: Training iteration.
        task: Name of its task; with stage and step it names the group.
        sample: Which of the group's samples.
        attempt: Which play of that sample.
        video: Path or URL of the task's video.
        kind: Kind of question.
        question: What was asked, the first `MAX_TEXT_CHARS` characters.
        truth: The right answer, as much of it.
        answer: What was answered, as much of it; None if nothing was.
        status: How it ended.
        outcome: One of `OUTCOMES`.
        failure: A `FailureMode`, or empty where it is right or nobody could judge it.
        reward: Total; None where it was not scored or could not be judged.
        advantage: What the learner was given; None where it did not learn from it.
        zooms: Zooms carried out.
        refused: Zooms refused.
        frames: Frames shown, overview included.
        turns: Rounds played.
        seconds: Wall time.
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
    """The JSON object of a line; None for a header, which says what a log is of.

    Raises:
        NoEpisode: It is neither.
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


def _refuse(constant: str) -> Any:
    raise EpisodeParseError(f"holds {constant}, which is no number in JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
"""Made once: `json.loads` with an argument makes one for every line."""


def episode_row(value: Json) -> EpisodeRow:
    """The columns of an episode's JSON object.

    Raises:
        NoEpisode: A part is missing or of another kind, or the format is of another version.
    """
    try:
        version = value["trajectory"].get("v")
        if version != FORMAT_VERSION:
            raise EpisodeParseError(f"format version {version!r}; this vz_ray reads version {FORMAT_VERSION}")
        return _columns(value, value["task"], value["trajectory"])
    except KeyError as error:
        raise EpisodeParseError(f"not an episode: {error.args[0]!r} is missing") from error
    except (TypeError, AttributeError, IndexError) as error:
        raise EpisodeParseError(f"not an episode: {error}") from error
    except ValueError as error:
        raise (
            error if isinstance(error, EpisodeParseError) else EpisodeParseError(f"not an episode: {error}")
        ) from error


def _columns(value: Json, task: Json, played: Json) -> EpisodeRow:
    calls = [turn["zoom"] for turn in played["turns"]]
    zooms = [(call["start_s"], call["end_s"]) for call in calls if call and "error" not in call]
    faults = [ZoomErrorKind(call["error"]) for call in calls if call and "error" in call]
    times = [ref[1] for ref in _refs(played)]
    status, reward = EpisodeStatus(played["status"]), played["reward"]
    outcome = _outcome(reward, status)
    trace = EpisodeTrace(
        status, zooms, faults, bool(calls) and calls[-1] is not None, times,
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
        sample=int(played["id"]["sample"]),
        attempt=int(played["id"]["attempt"]),
        video=str(task["video"]),
        kind=str(task["kind"]),
        question=_short(task["question"]),
        truth=_short(task["answer"]),
        answer=None if played["answer"] is None else _short(played["answer"]),
        status=status.value,
        outcome=outcome,
        failure=failure.value if failure else "",
        reward=_number(reward["total"], "reward") if reward and reward["valid"] else None,
        advantage=None if value["advantage"] is None else _number(value["advantage"], "advantage"),
        zooms=len(zooms),
        refused=len(faults),
        frames=len(times),
        turns=len(calls),
        seconds=_number(played["seconds"], "seconds"),
    )


def _outcome(reward: Json | None, status: EpisodeStatus) -> str:
    if reward is None or not reward["valid"] or status is EpisodeStatus.FAILED:
        return UNSCORED
    return CORRECT if reward["accuracy"] == 1 else WRONG


def _refs(played: Json) -> Iterator[list[Any]]:
    """Every frame shown, in order: `[row of frame_table, pts_s, digest]`."""
    yield from played["prompt"]["refs"]
    for turn in played["turns"]:
        if turn["observation"] is not None:
            yield from turn["observation"]["refs"]


def _short(text: object) -> str:
    return str(text)[:MAX_TEXT_CHARS]


def _number(value: Any, name: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise EpisodeParseError(f"{name} is {number}: not a finite number")
    return number
