"""Zoom gate: zoom only if a draft answer is uncertain.

After the overview, the policy answers without reasoning: the gate's prefix is forced and the answer is
sampled greedily. For multiple choice, the uncertainty is the entropy of the options' probabilities at
the token that distinguishes them, with the remaining probability as one more option. For free answers
it is the mean entropy of the draft's tokens, over the top log-probs of each. Both are divided by their
maximum.

A certain draft becomes the episode's only turn: the prefix and the sampled tokens. An uncertain draft
is discarded, and the episode continues normally. `extra["gate"]` of the trajectory records the decision.
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
"""Thresholds below and above every possible uncertainty."""
_MARK = re.compile(r"(?:^|(?<=\s))\(?([A-Z])[.):]\s")


@dataclass(frozen=True, slots=True)
class DraftAnswer:
    """A greedy continuation.

    Attributes:
        token_ids: `[T]`, sampled tokens.
        logprobs: `[T]`, log-probs by token id: of the requested tokens, or the top log-probs.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[Mapping[int, float], ...]


@runtime_checkable
class DraftingPolicy(Protocol):
    """A policy that returns log-probs."""

    async def draft_answer(
        self,
        prompt: Prompt,
        forced_token_ids: Sequence[int],
        logprob_token_ids: Sequence[int],
        *,
        max_tokens: int,
        request_id: str,
    ) -> DraftAnswer:
        """Continue `prompt` and `forced_token_ids` greedily up to and including `</answer>`.

        Return the log-probs of `logprob_token_ids` at each position; if empty, the top log-probs.
        """
        ...


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Decision of the gate.

    Attributes:
        zoom: Whether the episode continues and may zoom. If False, the draft is its answer.
        kind: `choice` or `free`.
        uncertainty: From 0 to 1.
        threshold: Uncertainty above which an episode zooms; None in mode `measure`.
        draft: Text of the draft answer; None if the draft did not end.
        seconds: Wall time of the draft.
    """

    zoom: bool
    kind: str
    uncertainty: float
    threshold: float | None
    draft: str | None
    seconds: float


async def apply_zoom_gate(env: ZoomEnv, policy: Policy) -> GateDecision:
    """Draft an answer to a started episode, and end the episode with the draft if it is certain.

    Raises:
        UserError: The policy returns no log-probs, or the thresholds file is invalid.
    """
    config, chat_format = env.config.gate, env.chat_format
    if not isinstance(policy, DraftingPolicy):
        raise UserError(
            f"episode.gate.mode is {config.mode}; it needs log-probs, and {type(policy).__name__} returns "
            "none. Use a vLLM engine or set episode.gate.mode=off."
        )
    started_at = time.monotonic()
    forced, options = forced_prefix(chat_format, config.draft_prefix, option_letters(env.task))
    draft = await policy.draft_answer(
        env.prompt, forced, options, max_tokens=config.max_draft_tokens, request_id=f"{env.id}/draft"
    )
    seconds = time.monotonic() - started_at
    end_token = () if draft.token_ids[-1:] == (chat_format.end_id,) else (chat_format.end_id,)
    token_ids = (*forced, *draft.token_ids, *end_token)
    text = chat_format.decode_turn(token_ids)
    answer = extract_answer(text)
    kind = CHOICE if options else FREE
    uncertainty = option_entropy(draft.logprobs, options) if options else token_entropy(draft.logprobs)
    threshold = get_threshold(config, kind)
    zoom = threshold is None or answer is None or uncertainty > threshold
    if not zoom:
        env.step(ExternalAction(text, token_ids), seconds)
    return GateDecision(zoom, kind, uncertainty, threshold, answer, seconds)


def option_letters(task: Task) -> tuple[str, ...]:
    """Return the option letters in a multiple-choice question, starting with A; empty for other types.

    Example: `("A", "B")` for "What flashes? A. disc B. ring"
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
    """Return the tokens to force, and for each letter the token that comes next.

    The tokens are taken from complete answers, because a tokenizer may merge a letter with the preceding
    text. The letter tokens are empty if no single token distinguishes the letters.
    """
    prefix = chat_format.strip_turn_prefix(prefix)
    prefix_ids = tuple(chat_format.tokenizer.encode(prefix, add_special_tokens=False))
    answers = [
        chat_format.tokenizer.encode(f"{prefix}{letter}</answer>", add_special_tokens=False) for letter in letters
    ]
    if len(answers) < 2:
        return prefix_ids, ()
    equal = [len(set(column)) == 1 for column in zip(*answers, strict=False)]
    position = equal.index(False) if False in equal else len(equal)
    options = {answer[position] for answer in answers if len(answer) > position}
    if len(options) < len(answers):
        return prefix_ids, ()
    return tuple(answers[0][:position]), tuple(answer[position] for answer in answers)


def option_entropy(logprobs: Sequence[Mapping[int, float]], options: Sequence[int]) -> float:
    """Return the normalized entropy of the options and the remaining probability; 1 without tokens."""
    if not logprobs:
        return 1.0
    return _entropy([math.exp(logprobs[0][option]) for option in options])


def token_entropy(logprobs: Sequence[Mapping[int, float]]) -> float:
    """Return the mean normalized entropy of the tokens' top log-probs; 1 without tokens."""
    if not logprobs:
        return 1.0
    entropies = [_entropy([math.exp(p) for p in position.values()]) for position in logprobs]
    return sum(entropies) / len(entropies)


def _entropy(probabilities: Sequence[float]) -> float:
    """Return the entropy of the probabilities and their remainder, divided by its maximum."""
    complete = [*probabilities, max(0.0, 1.0 - sum(probabilities))]
    return -sum(p * math.log(p) for p in complete if p > 0) / math.log(len(complete))


# -- calibration ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CalibrationPoint:
    """Effect of a threshold on a validation set: means over its questions. `frames` include the overview."""

    threshold: float
    accuracy: float
    frames: float
    zoom_rate: float


@dataclass(frozen=True, slots=True)
class GateCalibration:
    """Calibrated threshold of one answer kind, compared with zooming always and never."""

    num_questions: int
    best: CalibrationPoint
    always: CalibrationPoint
    never: CalibrationPoint


def save_calibration(path: Path, calibrations: Mapping[str, GateCalibration], metadata: Mapping[str, object]) -> None:
    """Write calibrations by answer kind, with `metadata` about their source."""
    content = {
        "version": CALIBRATION_VERSION,
        **metadata,
        "kinds": {kind: asdict(calibration) for kind, calibration in calibrations.items()},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def get_threshold(config: ZoomGateConfig, kind: str) -> float | None:
    """Return the threshold of an answer kind; None in mode `measure`. Uncalibrated kinds always zoom."""
    if config.mode != "on":
        return None
    if config.threshold is not None:
        return config.threshold
    return load_thresholds(config.thresholds_file).get(kind, ALWAYS_ZOOM)


@functools.lru_cache(maxsize=8)
def load_thresholds(path: str) -> Mapping[str, float]:
    """Load thresholds by answer kind from a file written by `save_calibration`.

    Raises:
        UserError: The file is missing or invalid.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["version"] != CALIBRATION_VERSION:
            raise ValueError(f"version {content['version']}, this code reads version {CALIBRATION_VERSION}")
        return {kind: float(entry["best"]["threshold"]) for kind, entry in content["kinds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"episode.gate.thresholds_file {path} is not a valid gate calibration ({error!r}). "
            "Create it with `vz-ray calibrate-gate`."
        ) from error
