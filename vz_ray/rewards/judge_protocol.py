"""Judge prompts, and strict parsing of judge replies.

`binary` (1 or 0) scores open-ended answers. `graded` (yes or no, and 0 to 5) is the judge of Video-MMLU.
`reading` is the first step for captions: the judge answers a question from the caption alone; that answer is
then graded. A reply in any other form is malformed and never interpreted.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from vz_ray.config.prompt_file import load_prompt_file
from vz_ray.utils.errors import UserError

MAX_SCORE = 5
_REASONING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_BINARY = re.compile(
    r"[\s*_`\"'(\[]*(?:(?:the\s+)?(?:verdict|score|judge?ment|answer)(?:\s+is)?\s*[:=]?)?"
    r"[\s*_`\"'(\[]*([01])[\s*_`\"')\].]*",
    re.IGNORECASE,
)
_BRACED = re.compile(r"\{[^{}]*\}")


class JudgeForm(StrEnum):
    """Form of a judge's reply."""

    BINARY = "binary"
    GRADED = "graded"
    READING = "reading"


@dataclass(frozen=True, slots=True)
class JudgeVerdict:
    """Verdict of a judge on one answer.

    Attributes:
        correct: Whether the answer is correct.
        score: 0 to 5; None in the binary form.
    """

    correct: bool
    score: float | None = None


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """Prompt template of a judge with the placeholders `{question}`, `{truth}` and `{answer}`."""

    system: str
    user: str

    @classmethod
    def load(cls, path: Path | str, form: JudgeForm) -> JudgePrompt:
        """Read and validate a prompt file.

        The `reading` form must not contain `{truth}`: the judge would copy it instead of reading the caption.

        Raises:
            UserError: The file is missing, or has wrong keys or placeholders.
        """
        path, values = load_prompt_file(path, cls.__slots__)
        prompt = cls(**values)
        try:
            user_message = prompt.messages("\0question", "\0truth", "\0answer")[1]["content"]
            prompt.system.format()
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise UserError(
                f"prompt file {path} cannot be formatted ({error!r}); user may contain {{question}}, "
                "{truth} and {answer}. Double all other braces."
            ) from error
        for placeholder in ("question", "truth", "answer"):
            required = placeholder != "truth" or form is not JudgeForm.READING
            if (f"\0{placeholder}" in user_message) is not required:
                raise UserError(
                    f"prompt file {path}: user {'lacks' if required else 'must not have'} {{{placeholder}}}"
                )
        return prompt

    def messages(self, question: str, truth: str, answer: str) -> list[dict[str, str]]:
        """Return the system and user message of a judge request."""
        user = self.user.format(question=question, truth=truth, answer=answer)
        return [{"role": "system", "content": self.system.format()}, {"role": "user", "content": user}]


def strip_reasoning(reply: str) -> str:
    """Remove reasoning in `<think>` and everything up to the last `Answer:`."""
    return _REASONING.sub("", reply).rpartition("Answer:")[2].strip()


def is_valid_reply(form: JudgeForm, reply: str) -> bool:
    """Return whether `reply` has the given form."""
    if form is JudgeForm.READING:
        return bool(strip_reasoning(reply))
    return parse_verdict(form, reply) is not None


def parse_verdict(form: JudgeForm, reply: str) -> JudgeVerdict | None:
    """Parse the verdict in `reply`, ignoring reasoning in `<think>`; None if the reply is malformed.

    Example:
        >>> parse_verdict(JudgeForm.GRADED, "{'pred': 'yes', 'score': 4}")
        JudgeVerdict(correct=True, score=4.0)
    """
    text = _REASONING.sub("", reply)
    if form is JudgeForm.BINARY:
        match = _BINARY.fullmatch(text)
        return None if match is None else JudgeVerdict(match[1] == "1")
    literals = _BRACED.findall(text)
    return _parse_graded(_parse_literal(literals[0])) if len(literals) == 1 else None


def _parse_literal(text: str) -> Any:
    """Parse a dictionary in JSON or Python notation."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def _parse_graded(value: Any) -> JudgeVerdict | None:
    if not isinstance(value, dict) or not {"pred", "score"} <= set(value):
        return None
    pred, score = str(value["pred"]).strip().casefold(), value["score"]
    if isinstance(score, str) and re.fullmatch(r"\s*\d(\.\d+)?\s*", score):
        score = float(score)
    if pred not in ("yes", "no") or isinstance(score, bool) or not isinstance(score, int | float):
        return None
    return JudgeVerdict(pred == "yes", float(score)) if 0 <= score <= MAX_SCORE else None
