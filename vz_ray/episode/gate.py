"""The zoom gate: a draft of the answer, given at once, says whether zooming is worth it.

After the overview the policy is made to answer without reasoning: the gate's
prefix is put in its mouth, and what follows is sampled greedily. Where options
are letters, the uncertainty is the entropy of their probabilities at the one
token that tells them apart, what is left for anything else counting as a
further option; for free answers it is the mean entropy of the draft's tokens,
of the likeliest of each. Both are divided by the largest they could be.

A draft that is certain enough is the episode's only turn: the prefix and the
tokens as they were sampled. Else it is forgotten, and the episode goes on as
any other. Either way the trajectory says so, in `extra["gate"]`.
"""

from __future__ import annotations

import functools
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from vz_ray.config.gate import GateConfig
from vz_ray.data.task import AnswerType, Task
from vz_ray.episode.machine import Episode
from vz_ray.episode.protocols import Policy, Prompt
from vz_ray.episode.trajectory import Written
from vz_ray.episode.wire import WireFormat
from vz_ray.episode.zoom_call import answer_of
from vz_ray.observe.errors import UserError

CHOICE, FREE = "choice", "free"
VERSION = 1
ALWAYS, NEVER = -1.0, 1.0
"""Thresholds below and above which no uncertainty lies."""
_MARK = re.compile(r"(?:^|(?<=\s))\(?([A-Z])[.):]\s")


@dataclass(frozen=True, slots=True)
class Draft:
    """A greedy continuation.

    Attributes:
        token_ids: `[T]`, as sampled.
        rows: `[T]`, log-probs by token id: of the tokens asked about, or of the likeliest.
    """

    token_ids: tuple[int, ...]
    rows: tuple[Mapping[int, float], ...]


@runtime_checkable
class Drafter(Protocol):
    """A policy that tells probabilities."""

    async def draft(
        self, prompt: Prompt, forced: Sequence[int], about: Sequence[int], *, max_tokens: int, request: str
    ) -> Draft:
        """Continues `prompt` and `forced` greedily up to `</answer>`, kept.

        Log-probs are of the tokens in `about`, or where that is empty of the likeliest.
        """
        ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate found.

    Attributes:
        zoom: The episode went on and could zoom; False: the draft was its answer.
        kind: `choice` or `free`.
        uncertainty: From 0 to 1.
        threshold: Above it an episode zooms; None where it was only measured.
        draft: The draft's answer; None if it did not end.
        seconds: Wall time of the draft.
    """

    zoom: bool
    kind: str
    uncertainty: float
    threshold: float | None
    draft: str | None
    seconds: float


async def pass_gate(episode: Episode, policy: Policy) -> Verdict:
    """Drafts an answer to a begun episode, and ends the episode with it where the gate stays shut.

    Raises:
        UserError: The policy tells no probabilities, or there is no such calibration.
    """
    config, wire = episode.config.gate, episode.wire
    if not isinstance(policy, Drafter):
        raise UserError(
            f"episode.gate.mode is {config.mode}, and {type(policy).__name__} tells no probabilities; "
            "play with an engine of this project, or set episode.gate.mode=off"
        )
    began = time.monotonic()
    forced, options = forced_ids(wire, config.prefix, letters_of(episode.task))
    draft = await policy.draft(
        episode.prompt, forced, options, max_tokens=config.max_tokens, request=f"{episode.id}/draft"
    )
    seconds = time.monotonic() - began
    sampled = draft.token_ids
    said = (*forced, *sampled, *(() if sampled[-1:] == (wire.end_id,) else (wire.end_id,)))
    answer = answer_of(wire.text_of(said))
    kind = CHOICE if options else FREE
    uncertainty = option_entropy(draft.rows, options) if options else token_entropy(draft.rows)
    threshold = threshold_of(config, kind)
    zoom = threshold is None or answer is None or uncertainty > threshold
    if not zoom:
        episode.act(Written(wire.text_of(said), said), seconds)
    return Verdict(zoom, kind, uncertainty, threshold, answer, seconds)


def letters_of(task: Task) -> tuple[str, ...]:
    """Letters of the options that a question lists, from A on; none unless it is multiple choice.

    Example: `("A", "B")` of "What flashes? A. disc B. ring"
    """
    if task.answer_type is not AnswerType.MULTIPLE_CHOICE:
        return ()
    longest: list[str] = []
    run: list[str] = []
    for letter in _MARK.findall(f"{task.question} "):
        run = [*run, letter] if run and ord(letter) == ord(run[-1]) + 1 else [letter]
        if run[0] == "A" and len(run) >= max(2, len(longest)):
            longest = run
    return tuple(longest)


def forced_ids(
    wire: WireFormat, prefix: str, letters: Sequence[str]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens put in the policy's mouth, and for each letter the token that would come next.

    The letters' tokens are those of whole answers, since a tokenizer may join a letter with what
    stands before it. None where one token does not tell the letters apart.
    """
    alone = tuple(wire.tokenizer.encode(prefix, add_special_tokens=False))
    answers = [
        wire.tokenizer.encode(f"{prefix}{letter}</answer>", add_special_tokens=False) for letter in letters
    ]
    if len(answers) < 2:
        return alone, ()
    same = [len(set(column)) == 1 for column in zip(*answers, strict=False)]
    place = same.index(False) if False in same else len(same)
    options = {answer[place] for answer in answers if len(answer) > place}
    if len(options) < len(answers):
        return alone, ()
    return tuple(answers[0][:place]), tuple(answer[place] for answer in answers)


def option_entropy(rows: Sequence[Mapping[int, float]], options: Sequence[int]) -> float:
    """Entropy of the options and of everything else, over that of all alike; 1 without a token."""
    if not rows:
        return 1.0
    return _entropy([math.exp(rows[0][option]) for option in options])


def token_entropy(rows: Sequence[Mapping[int, float]]) -> float:
    """Mean entropy of the tokens, each over that of its likeliest all alike; 1 without a token."""
    if not rows:
        return 1.0
    return sum(_entropy([math.exp(p) for p in row.values()]) for row in rows) / len(rows)


def _entropy(known: Sequence[float]) -> float:
    """Of these probabilities and the rest, over the logarithm of their number."""
    every = [*known, max(0.0, 1.0 - sum(known))]
    return -sum(p * math.log(p) for p in every if p > 0) / math.log(len(every))


# -- calibration ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Point:
    """What a threshold would have given on a validation set.

    Attributes:
        threshold: Above it an episode zooms.
        accuracy: Mean over the questions.
        frames: Shown per question, overview included.
        zooming: Share of questions that zoom.
    """

    threshold: float
    accuracy: float
    frames: float
    zooming: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """The threshold of one kind of answer.

    Attributes:
        questions: That it rests on.
        best: The threshold, and what it gives.
        always: What zooming always gives.
        never: What the drafts give.
    """

    questions: int
    best: Point
    always: Point
    never: Point


def save_gate(path: Path, found: Mapping[str, Calibration], facts: Mapping[str, object]) -> None:
    """Writes calibrations by kind; `facts` say what they were made from."""
    content = {"version": VERSION, **facts, "kinds": {kind: asdict(one) for kind, one in found.items()}}
    path.write_text(json.dumps(content, indent=1) + "\n")


def threshold_of(config: GateConfig, kind: str) -> float | None:
    """None where the gate only measures; a kind that was not calibrated always zooms."""
    if config.mode != "on":
        return None
    if config.threshold is not None:
        return config.threshold
    return read_thresholds(config.file).get(kind, ALWAYS)


@functools.lru_cache(maxsize=8)
def read_thresholds(path: str) -> Mapping[str, float]:
    """Thresholds by kind, of a file that `save_gate` wrote.

    Raises:
        UserError: There is none, or it is something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, this code reads version {VERSION}")
        return {kind: float(one["best"]["threshold"]) for kind, one in content["kinds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"episode.gate.file {path} is no calibration of a gate ({error!r}); make one with "
            "`vz-ray calibrate-gate`"
        ) from error
