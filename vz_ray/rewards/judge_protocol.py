"""What a judge is asked, and reading what it says. Pure.

Two forms: `binary` (1 or 0) for open-ended answers, `graded` (yes or no, and 0
to 5) as the judge of Video-MMLU. A reply is read strictly: what is neither is
nonsense, never a guess. A third, `reading`, is no verdict yet: what a caption
says about a question, which is then graded.
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
_THOUGHTS = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_BINARY = re.compile(
    r"[\s*_`\"'(\[]*(?:(?:the\s+)?(?:verdict|score|judge?ment|answer)(?:\s+is)?\s*[:=]?)?"
    r"[\s*_`\"'(\[]*([01])[\s*_`\"')\].]*",
    re.IGNORECASE,
)
_BRACED = re.compile(r"\{[^{}]*\}")


class JudgeForm(StrEnum):
    """What a judge replies with."""

    BINARY = "binary"
    GRADED = "graded"
    READING = "reading"


@dataclass(frozen=True, slots=True)
class JudgeVerdict:
    """What a judge found.

    Attributes:
        correct: Whether the answer is right.
        score: 0 to 5; None in the binary form.
    """

    correct: bool
    score: float | None = None


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """What a judge is told; `{question}`, `{truth}` and `{answer}` are filled in."""

    system: str
    user: str

    @classmethod
    def load(cls, path: Path | str, form: JudgeForm) -> JudgePrompt:
        """Reads a wording file; `UserError` if it is missing, has wrong keys or blanks.

        Who reads a caption is not told the truth.
        """
        path, values = load_prompt_file(path, cls.__slots__)
        wording = cls(**values)
        try:
            asked = wording.messages("\0question", "\0truth", "\0answer")[1]["content"]
            wording.system.format()
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise UserError(
                f"prompt file {path}: it cannot be filled in ({error!r}); user may have {{question}}, "
                "{truth} and {answer}, and braces of its own are doubled"
            ) from error
        for blank in ("question", "truth", "answer"):
            wanted = blank != "truth" or form is not JudgeForm.READING
            if (f"\0{blank}" in asked) is not wanted:
                raise UserError(
                    f"prompt file {path}: user {'lacks' if wanted else 'must not have'} {{{blank}}}"
                )
        return wording

    def messages(self, question: str, truth: str, answer: str) -> list[dict[str, str]]:
        """The conversation that a judge is asked to continue."""
        user = self.user.format(question=question, truth=truth, answer=answer)
        return [{"role": "system", "content": self.system.format()}, {"role": "user", "content": user}]


def strip_reasoning(reply: str) -> str:
    """A reply without its reasoning, in `<think>` or before a last `Answer:`."""
    return _THOUGHTS.sub("", reply).rpartition("Answer:")[2].strip()


def is_valid_reply(form: JudgeForm, reply: str) -> bool:
    """Whether a reply is of its form."""
    return (
        bool(strip_reasoning(reply)) if form is JudgeForm.READING else parse_verdict(form, reply) is not None
    )


def parse_verdict(form: JudgeForm, reply: str) -> JudgeVerdict | None:
    """The verdict that `reply` states, None if it states none; reasoning in `<think>` is passed over.

    Example: `read_reply(Form.BINARY, "Verdict: 1")`, `read_reply(Form.GRADED, "{'pred': 'yes', 'score': 4}")`
    """
    said = _THOUGHTS.sub("", reply)
    if form is JudgeForm.BINARY:
        match = _BINARY.fullmatch(said)
        return None if match is None else JudgeVerdict(match[1] == "1")
    found = _BRACED.findall(said)
    return _graded(_literal(found[0])) if len(found) == 1 else None


def _literal(text: str) -> Any:
    """A dictionary in JSON, or as Python prints it."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def _graded(said: Any) -> JudgeVerdict | None:
    if not isinstance(said, dict) or not {"pred", "score"} <= set(said):
        return None
    pred, score = str(said["pred"]).strip().casefold(), said["score"]
    if isinstance(score, str) and re.fullmatch(r"\s*\d(\.\d+)?\s*", score):
        score = float(score)
    if pred not in ("yes", "no") or isinstance(score, bool) or not isinstance(score, int | float):
        return None
    return JudgeVerdict(pred == "yes", float(score)) if 0 <= score <= MAX_SCORE else None
