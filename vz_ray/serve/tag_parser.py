"""Tells reasoning from answer in a turn that is still being said."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<video_zoom>", "</video_zoom>", "<|im_end|>")
_TAG = re.compile("|".join(map(re.escape, _TAGS)))


@dataclass(slots=True)
class TagStreamParser:
    """One turn, heard bit by bit.

    What stands in `<answer>` is the answer, a zoom call is neither, and everything
    else is reasoning. A piece that could be the beginning of a tag is kept until
    it is known to be none.

    Example:
        speech = Speech()
        speech.hear("<think>red</think><ans") == [("red", False)]
        speech.hear("<think>red</think><answer>A") == [("A", True)]
    """

    position: int = 0
    """How much of the turn has been told."""
    open_tag: str = ""
    reasoning: str = ""
    answers: list[str] = field(default_factory=list)

    def feed(self, so_far: str, *, final: bool = False) -> list[tuple[str, bool]]:
        """What is new in the turn's text so far: pieces, and whether each belongs to the answer.

        Args:
            so_far: The whole turn up to now.
            final: Nothing will follow.
        """
        pieces: list[tuple[str, bool]] = []
        while self.position < len(so_far):
            tag = _TAG.search(so_far, self.position)
            end = tag.start() if tag else len(so_far) - (0 if final else _held(so_far[self.position :]))
            self._tell(so_far[self.position : end], pieces)
            if tag is None:
                self.position = end
                break
            self.position = tag.end()
            self._enter(tag.group())
        return pieces

    @property
    def answer(self) -> str:
        """The last answer span, as `episode` reads it."""
        return self.answers[-1].strip() if self.answers else ""

    def _enter(self, tag: str) -> None:
        self.open_tag = "" if tag.startswith("</") else tag
        if tag == "<answer>":
            self.answers.append("")

    def _tell(self, text: str, pieces: list[tuple[str, bool]]) -> None:
        if not text or self.open_tag == "<video_zoom>":
            return
        answer = self.open_tag == "<answer>"
        if answer:
            self.answers[-1] += text
        else:
            self.reasoning += text
        pieces.append((text, answer))


def _held(text: str) -> int:
    """Length of the end of `text` that may be the beginning of a tag."""
    for length in range(min(len(text), max(map(len, _TAGS)) - 1), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in _TAGS):
            return length
    return 0
