"""What a chat endpoint is sent, and how its reply is taken. Pure, but for reading a prompt file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vz_ray.config.prompt_file import load_prompt_file
from vz_ray.env.chat_format import IMAGE_SLOT
from vz_ray.env.protocols import PromptMessage
from vz_ray.env.zoom_call import ZOOM_CLOSE, ZOOM_OPEN
from vz_ray.video.frame import Frame
from vz_ray.video.image_encoding import encode_image

_BYTES_PER_TOKEN = 2
"""Of text, for estimates that must not be too low."""
_MESSAGE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class TeacherPrompt:
    """What the expert alone is told.

    Attributes:
        system: Added to the system message.
        turn: Added to the message that it answers first.
    """

    system: str = ""
    turn: str = ""

    @classmethod
    def load(cls, path: Path | str) -> TeacherPrompt:
        """Reads a prompt file; `UserError` if it is missing or has wrong keys."""
        _, values = load_prompt_file(path, cls.__slots__)
        return cls(**values)


def encode_content(
    message: PromptMessage, image_format: str, image_cache: dict[str, str]
) -> str | list[dict[str, Any]]:
    """Text, or text and images in their places.

    Args:
        message: With `IMAGE_SLOT` for each of its frames.
        image_format: `jpeg` or `png`.
        image_cache: Images made so far, by frame; kept from turn to turn.
    """
    if not message.frames:
        return message.text
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(message.text.split(IMAGE_SLOT)):
        parts += [{"type": "text", "text": text}] if text else []
        if number < len(message.frames):
            url = _url(message.frames[number], image_format, image_cache)
            parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def _url(frame: Frame, image: str, encoded: dict[str, str]) -> str:
    name = f"{frame.ref.digest}/{frame.ref.width}"
    if name not in encoded:
        encoded[name] = (
            f"data:image/{image};base64,{base64.b64encode(encode_image(frame.rgb, image)).decode()}"
        )
    return encoded[name]


def estimate_prompt_tokens(messages: Sequence[PromptMessage], image_tokens: int) -> int:
    """How many tokens a prompt takes, rather too many."""
    text = sum(len(m.text.encode()) // _BYTES_PER_TOKEN + _MESSAGE_TOKENS for m in messages)
    return text + image_tokens * sum(len(m.frames) for m in messages)


def add_teacher_prompt(
    messages: Sequence[PromptMessage], prompt: TeacherPrompt, prefix_turns: int
) -> list[PromptMessage]:
    """`messages` with what the expert alone is told, in the system message and in the user turn after
    `prefix_turns` turns of others."""
    found: list[PromptMessage] = []
    turns = 0
    for message in messages:
        more = prompt.system if message.role == "system" else ""
        if message.role == "user" and turns == prefix_turns:
            more = prompt.turn
        turns += message.role == "assistant"
        text = f"{message.text}\n{more}" if more and message.role == "system" else message.text + more
        found.append(PromptMessage(message.role, text, message.frames))
    return found


def truncate_to_one_turn(text: str, finish_reason: str) -> str:
    """What was said up to and with the first `</video_zoom>`; put back where a server left it out."""
    said, close, _ = text.partition(ZOOM_CLOSE)
    if close:
        return said.strip() + close
    cut_off = ZOOM_OPEN in said and finish_reason == "stop"
    return said.strip() + (ZOOM_CLOSE if cut_off else "")
