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

from vz_ray.config.zoom_gate import ZoomGateConfig
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.protocols import Policy, Prompt
from vz_ray.env.task import AnswerType, Task
from vz_ray.env.trajectory import ExternalAction
from vz_ray.env.zoom_call import extract_answer
from vz_ray.env.zoom_env import ZoomEnv
from vz_ray.utils.errors import UserError

CHOICE, FREE = "choice", "free"
CALIBRATION_VERSION = 1
ALWAYS_ZOOM, NEVER_ZOOM = -1.0, 1.0
"""Thresholds below and above which no uncertainty lies."""
_MARK = re.compile(r"(?:^|(?<=\s))\(?([A-Z])[.):]\s")


@dataclass(frozen=True, slots=True)
class DraftAnswer:
    """A greedy continuation.

    Attributes:
        token_ids: `[T]`, as sampled.
        logprobs: `[T]`, log-probs by token id: of the tokens asked about, or of the likeliest.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[Mapping[int, float], ...]


@runtime_checkable
class DraftingPolicy(Protocol):
    """A policy that tells probabilities."""

    async def draft_answer(
        self,
        prompt: Prompt,
        forced_token_ids: Sequence[int],
        logprob_token_ids: Sequence[int],
        *,
        max_tokens: int,
        request_id: str,
    ) -> DraftAnswer:
        """Continues `prompt` and `forced_token_ids` greedily up to `</answer>`, kept.

        Log-probs are of the tokens in `logprob_token_ids`, or where that is empty of the likeliest.
        """
        ...


@dataclass(frozen=True, slots=True)
class GateDecision:
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


async def apply_zoom_gate(env: ZoomEnv, policy: Policy) -> GateDecision:
    """Drafts an answer to a begun episode, and ends the episode with it where the gate stays shut.

    Raises:
        UserError: The policy tells no probabilities, or there is no such calibration.
    """
    config, wire = env.config.gate, env.chat_format
    if not isinstance(policy, DraftingPolicy):
        raise UserError(
            f"episode.gate.mode is {config.mode}, and {type(policy).__name__} tells no probabilities; "
            "play with an engine of this project, or set episode.gate.mode=off"
        )
    began = time.monotonic()
    forced, options = forced_prefix(wire, config.draft_prefix, option_letters(env.task))
    draft = await policy.draft_answer(
        env.prompt, forced, options, max_tokens=config.max_draft_tokens, request_id=f"{env.id}/draft"
    )
    seconds = time.monotonic() - began
    sampled = draft.token_ids
    said = (*forced, *sampled, *(() if sampled[-1:] == (wire.end_id,) else (wire.end_id,)))
    answer = extract_answer(wire.decode_turn(said))
    kind = CHOICE if options else FREE
    uncertainty = option_entropy(draft.logprobs, options) if options else token_entropy(draft.logprobs)
    threshold = get_threshold(config, kind)
    zoom = threshold is None or answer is None or uncertainty > threshold
    if not zoom:
        env.step(ExternalAction(wire.decode_turn(said), said), seconds)
    return GateDecision(zoom, kind, uncertainty, threshold, answer, seconds)


def option_letters(task: Task) -> tuple[str, ...]:
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


def forced_prefix(
    chat_format: ChatFormat, prefix: str, letters: Sequence[str]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens put in the policy's mouth, and for each letter the token that would come next.

    The letters' tokens are those of whole answers, since a tokenizer may join a letter with what
    stands before it. None where one token does not tell the letters apart.
    """
    alone = tuple(chat_format.tokenizer.encode(prefix, add_special_tokens=False))
    answers = [
        chat_format.tokenizer.encode(f"{prefix}{letter}</answer>", add_special_tokens=False)
        for letter in letters
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
class CalibrationPoint:
    """What a threshold would have given on a validation set.

    Attributes:
        threshold: Above it an episode zooms.
        accuracy: Mean over the questions.
        frames: Shown per question, overview included.
        zoom_rate: Share of questions that zoom.
    """

    threshold: float
    accuracy: float
    frames: float
    zoom_rate: float


@dataclass(frozen=True, slots=True)
class GateCalibration:
    """The threshold of one kind of answer.

    Attributes:
        num_questions: That it rests on.
        best: The threshold, and what it gives.
        always: What zooming always gives.
        never: What the drafts give.
    """

    num_questions: int
    best: CalibrationPoint
    always: CalibrationPoint
    never: CalibrationPoint


def save_calibration(
    path: Path, calibrations: Mapping[str, GateCalibration], metadata: Mapping[str, object]
) -> None:
    """Writes calibrations by kind; `metadata` say what they were made from."""
    content = {
        "version": CALIBRATION_VERSION,
        **metadata,
        "kinds": {kind: asdict(one) for kind, one in calibrations.items()},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def get_threshold(config: ZoomGateConfig, kind: str) -> float | None:
    """None where the gate only measures; a kind that was not calibrated always zooms."""
    if config.mode != "on":
        return None
    if config.threshold is not None:
        return config.threshold
    return load_thresholds(config.thresholds_file).get(kind, ALWAYS_ZOOM)


@functools.lru_cache(maxsize=8)
def load_thresholds(path: str) -> Mapping[str, float]:
    """Thresholds by kind, of a file that `save_gate` wrote.

    Raises:
        UserError: There is none, or it is something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["version"] != CALIBRATION_VERSION:
            raise ValueError(f"version {content['version']}, this code reads version {CALIBRATION_VERSION}")
        return {kind: float(one["best"]["threshold"]) for kind, one in content["kinds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"episode.gate.thresholds_file {path} is no calibration of a gate ({error!r}); make one with "
            "`vz-ray calibrate-gate`"
        ) from error
