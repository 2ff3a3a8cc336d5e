"""Texts of a conversation, from a prompt file that users edit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from vz_ray.config.prompt_file import load_prompt_file
from vz_ray.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """Texts of a conversation with the fields `{frames}`, `{question}`, `{error}` and `{notice}`.

    Attributes:
        question: First user turn.
        reply: User turn after an executed zoom.
        refusal: User turn after a rejected zoom.
        notice: Appended to the user turn before the last round.
        decode_refusal: User turn after a decode error; default: `refusal`.
        frame: One frame, with `{number}` (from 0 in each turn), `{time}` (seconds) and `{image}`; empty uses the
            text that the model family recommends.
        video: Label of each video if there are several; `{number}` counts from 1.
        several: Appended to a question about several videos; `{count}` is their number.
    """

    system: str
    question: str
    reply: str
    refusal: str
    notice: str
    # The following fields are optional in a prompt file.
    decode_refusal: str = ""
    frame: str = ""
    video: str = "\nVideo {number}:\n"
    several: str = (
        '\nThere are {count} videos; a zoom says which: {{"video": i, "segment": [start_sec, end_sec], "fps": n}}.'
    )

    @classmethod
    def load(cls, path: Path | str) -> PromptTemplate:
        """Load a prompt file.

        Raises:
            UserError: The file is missing, or a key or field is invalid.
        """
        path, values = load_prompt_file(path, cls.__slots__[:-_NUM_OPTIONAL], cls.__slots__[-_NUM_OPTIONAL:])
        template = cls(**values)
        for key, (examples, required) in _TEMPLATE_FIELDS.items():
            if key != "frame" or template.frame:
                _check_template_fields(path, key, getattr(template, key), examples, required)
        return template

    @property
    def fingerprint_items(self) -> list[tuple[str, str]]:
        """Keys and texts that identify the template.

        `video` and `several` are included only if they differ from the defaults: templates from before
        these keys keep their identity.
        """
        defaults = {field.name: field.default for field in fields(self) if field.name in ("video", "several")}
        return sorted((key, text) for key, text in asdict(self).items() if defaults.get(key) != text)


_NUM_OPTIONAL = 4
_TEMPLATE_FIELDS: Mapping[str, tuple[Mapping[str, object], Sequence[str]]] = {
    "question": ({"frames": "", "question": ""}, ("frames", "question")),
    "reply": ({"frames": "", "notice": ""}, ("frames",)),
    "refusal": ({"error": "", "notice": ""}, ("error",)),
    "decode_refusal": ({"error": "", "notice": ""}, ()),
    "frame": ({"number": 0, "time": 0.0, "image": ""}, ("time", "image")),
    "video": ({"number": 0}, ("number",)),
    "several": ({"count": 0}, ()),
}
"""Per key: allowed fields with example values, and required fields."""


def _check_template_fields(
    path: Path, key: str, text: str, examples: Mapping[str, object], required: Sequence[str]
) -> None:
    try:
        text.format(**examples)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        allowed = ", ".join(f"{{{name}}}" for name in examples)
        raise UserError(
            f"prompt file {path}: {key} {text!r} is not a valid template ({error!r}); "
            f"allowed fields are {allowed}. Double literal braces."
        ) from error
    for name in required:
        if not re.search(rf"{{{name}[:}}]", text):
            raise UserError(f"prompt file {path}: {key} {text!r} lacks {{{name}}}")
